"""Import paths in a config: a user's own model, data source or optimizer, named as `pkg.mod:name`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any


def import_target(target: str) -> Any:
    """The object that `target` names. Modules of the working directory are found too.

    Raises ValueError saying what is wrong with it.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{target!r} is not an import path of the form pkg.mod:name")
    if not any(isinstance(finder, _WorkingDirectory) for finder in sys.meta_path):
        sys.meta_path.append(_WorkingDirectory())
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name!r} named by {target!r}: {error}") from error
    except AttributeError:
        raise ValueError(f"module {module_name!r} has no {attribute!r}, named by {target!r}") from None


class _WorkingDirectory:
    """Finds top-level modules in the directory the program was started in, after every other place.

    On `sys.path` that directory could hide our own packages: folders named `data` or `models` are common.
    """

    def __init__(self) -> None:
        self._directory = os.getcwd()

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [self._directory]) if path is None else None
