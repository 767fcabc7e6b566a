"""Import paths in a config: a user's model, data source or optimizer, named as `pkg.mod:name`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def import_target(target: str) -> Any:
    """The object that `target` names. Modules of the working directory are found, as `python -m` would find them.

    Imports other than Stoker's are logged with their file. Raises ValueError for an invalid path, also for a module
    inside a run directory, which may come from another user.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{target!r} is not an import path of the form pkg.mod:name")
    if not module_name.startswith("stoker."):
        _find_modules_of_the_working_directory()
        _refuse_module_of_a_run(target, module_name)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name!r} named by {target!r}: {error}") from error
    except Exception as error:  # the module is a user's program
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({last.filename}:{last.lineno})"
        raise ValueError(
            f"cannot import {module_name!r} named by {target!r}: {type(error).__name__}: {error}{where}"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"module {module_name!r} has no {attribute!r}, named by {target!r}")
    if not module_name.startswith("stoker."):
        _log_import(target, getattr(sys.modules[module_name], "__file__", None))
    return getattr(module, attribute)


@functools.cache  # a data source may be resolved at every document
def _log_import(target: str, file: str | None) -> None:
    log.info("imported %s from %s", target, file)


def _find_modules_of_the_working_directory() -> None:
    """Put it first on the import path, where `stoker train` and ranks under `python -P` do not have it."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


@functools.cache
def _refuse_module_of_a_run(target: str, module_name: str) -> None:
    """Checks every package on the path before it is imported. Raises ValueError."""
    names = module_name.split(".")
    for end in range(1, len(names) + 1):
        name = ".".join(names[:end])
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # the import itself reports the error
            return
        if spec is None:
            return
        origin = [spec.origin] if spec.has_location and spec.origin else []
        for place in [*origin, *(spec.submodule_search_locations or ())]:
            run = run_around(Path(place))
            if run is not None:
                raise ValueError(
                    f"{target!r} would be imported from {place}, inside the run directory {run}: modules are never "
                    "taken from there; copy it to another folder and start from there"
                )


def run_around(place: Path) -> Path | None:
    """The run directory that contains `place`."""
    for folder in place.resolve().parents:
        if (folder / "config.yaml").is_file() and (folder / "attempts").is_dir():
            return folder
    return None
