"""Fields of the config by what may change when a run is resumed; `stoker.conf.schema` explains the three kinds."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def _kind(kind: str, default: Any) -> Any:
    metadata = {"kind": kind}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def free(default: Any = None) -> Any:
    """A field that may change at every start of a run."""
    return _kind("free", default)


def maths(default: Any = None) -> Any:
    """A field that changes the run's numbers: needs `run.change=true` on resume."""
    return _kind("maths", default)


def fixed(default: Any = None) -> Any:
    """A field that cannot change within a run."""
    return _kind("fixed", default)
