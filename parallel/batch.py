"""A batch: the input of an engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100  # a label that carries no loss


@dataclass(frozen=True)
class Batch:
    """Training rows, all `[rows, seq_len]`.

    `tokens` and `labels` are int64; a label of IGNORE_INDEX is not trained on. `documents` (int32) numbers the
             documents of
    a row, so that attention can be kept inside them. `positions` (int64) counts from 0 within the row, or within each
    document where attention is kept inside documents.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(self.tokens[rows], self.labels[rows], self.positions[rows], self.documents[rows])

    def padded(self, multiple: int) -> Batch:
        """These rows and as many without a label as make their number a multiple."""
        last = self[-1:]
        unlabelled = Batch(last.tokens, torch.full_like(last.labels, IGNORE_INDEX), last.positions, last.documents)
        pieces = [vars(self), *[vars(unlabelled)] * (-len(self) % multiple)]
        return Batch(**{name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})

    def to(self, device: torch.device) -> Batch:
        """The same rows on `device`, copied without waiting where the memory is pinned."""
        parts = (self.tokens, self.labels, self.positions, self.documents)
        return Batch(*(part.to(device, non_blocking=True) for part in parts))

    def pin(self) -> Batch:
        """The same rows in page-locked memory."""
        parts = (self.tokens, self.labels, self.positions, self.documents)
        return Batch(*(part.pin_memory() for part in parts))

    def valid_tokens(self) -> Tensor:
        """Number of labels that carry a loss: int64 scalar on the rows' device."""
        return (self.labels != IGNORE_INDEX).sum()
