"""Global batches, however they were cut over ranks."""

from __future__ import annotations

import dataclasses
import hashlib

import torch

from stoker.parallel.batch import Batch


def digest(rows: Batch) -> str:
    parts = (rows.tokens, rows.labels, rows.positions, rows.documents)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def together(parts: list[Batch]) -> Batch:
    """Row s of the global batch is on rank s mod dp."""
    names = [field.name for field in dataclasses.fields(Batch)]
    return Batch(*(torch.stack([getattr(part, name) for part in parts], 1).flatten(0, 1) for name in names))
