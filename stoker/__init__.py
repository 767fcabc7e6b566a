"""Stoker: distributed training of language models.

    import stoker

    ending = stoker.run(["model=tiny", "steps=20", "run.dir=runs/first"])

The rooms of the repository are imported under this name: `stoker.launch`, `stoker.trainer`, `stoker.checkpoint`,
`stoker.models`, `stoker.data`, `stoker.parallel`, `stoker.conf`. Each room's `__init__` explains how it works.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stoker.trainer.loop import Trainer as Trainer
    from stoker.trainer.main import run as run

__version__ = "0.1.0"
__all__ = ["Trainer", "__version__", "run"]

_ON_USE = {"run": "stoker.trainer.main", "Trainer": "stoker.trainer.loop"}  # they import torch, which takes seconds


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return getattr(importlib.import_module(_ON_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
