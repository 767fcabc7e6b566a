"""Global batches, however they were cut over ranks."""

from __future__ import annotations

import hashlib

import torch

from stoker.parallel.batch import Batch


def digest(rows: Batch) -> str:
    parts = (part for part in vars(rows).values() if part is not None)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def together(parts: list[Batch]) -> Batch:
    """Row s of the global batch is on rank s mod dp."""
    held = [name for name, field in vars(parts[0]).items() if field is not None]
    return Batch(**{name: torch.stack([vars(part)[name] for part in parts], 1).flatten(0, 1) for name in held})
