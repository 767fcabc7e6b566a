"""Import paths in a config: a user's own model, data source or optimizer, named as `pkg.mod:name`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def import_target(target: str) -> Any:
    """The object that `target` names. Modules of the working directory are found, as `python -m` would find them.

    Raises ValueError saying what is wrong with it.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{target!r} is not an import path of the form pkg.mod:name")
    if not module_name.startswith("stoker."):
        _find_modules_of_the_working_directory()
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name!r} named by {target!r}: {error}") from error
    except AttributeError:
        raise ValueError(f"module {module_name!r} has no {attribute!r}, named by {target!r}") from None


def _find_modules_of_the_working_directory() -> None:
    """Put it first on the import path, where `stoker train` and ranks under `python -P` do not have it."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
