"""Sums over the tokens of each document of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from stoker.parallel.batch import Batch


def by_document(batch: Batch, values: Tensor) -> Tensor:
    """The sums of `values` (fp64 `[rows, seq_len]`) over each document: fp64 `[rows x places]`, those of a row in turn.

    There are as many places as a row can have documents, and an even number, so that nothing waits for the device to
    count them.
    """
    rows, length = values.shape
    places = length + length % 2
    row = torch.arange(rows, device=values.device)[:, None] * places
    sums = torch.zeros(rows * places, dtype=values.dtype, device=values.device)
    return sums.index_add(0, (row + batch.documents).flatten(), values.flatten())
