"""A batch: the input of an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100  # a label that carries no loss
# In the place of weights where answers are rated: of the labels of a desirable answer, of an undesirable one, and of
# one to another prompt.
DESIRABLE, UNDESIRABLE, MISMATCHED = 1.0, -1.0, 2.0


@dataclass(frozen=True)
class Batch:
    """Training rows, `[rows, seq_len]` unless said otherwise.

    `tokens` and `labels` are int64; a label of IGNORE_INDEX is not trained on. `documents` (int32) numbers the
    documents of a row, so that attention can be kept inside them. `positions` (int64) counts from 0 within the row, or
    within each document where attention is kept inside documents. `weights` (float32) are factors of the labels'
    losses, or ratings; None where all are 1. `reference` (float32) holds the log-probability of each label under a
    reference model, for objectives that need it. `teacher_tokens` (int32) and `teacher_log_probabilities` (float32),
    both `[rows, seq_len, k]`, are what a teacher predicts for each label. `baseline` (float64 `[rows]`) is a number of
    the whole step, the same in each row, for objectives that need one. `numbers` (int64), where there is dropout, are
    the tokens' in the run: that of the sequence times seq_len, plus the place in it.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor
    weights: Tensor | None = None
    reference: Tensor | None = None
    teacher_tokens: Tensor | None = None
    teacher_log_probabilities: Tensor | None = None
    baseline: Tensor | None = None
    numbers: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: slice) -> Batch:
        return self.map(lambda field: field[rows])

    def padded(self, multiple: int) -> Batch:
        """These rows and as many without a label as make their number a multiple."""
        missing = -len(self) % multiple
        if not missing:
            return self
        more = self.map(lambda field: torch.cat([field, *[field[-1:]] * missing]))
        more.labels[len(self) :] = IGNORE_INDEX
        return more

    def to(self, device: torch.device) -> Batch:
        """The same rows on `device`, copied without waiting where the memory is pinned."""
        return self.map(lambda field: field.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The same rows in page-locked memory."""
        return self.map(lambda field: field.pin_memory())

    def numbered(self, first: int, rank: int, ranks: int) -> Batch:
        """The same rows with `numbers`: they are every `ranks`th sequence of a global batch, from its number `rank` on.

        `first` is the number in the run of the first sequence of the global batch.
        """
        rows, length = self.tokens.shape
        sequences = torch.arange(first + rank, first + rank + rows * ranks, ranks)
        numbers = sequences[:, None] * length + torch.arange(length)
        return replace(self, numbers=numbers.pin_memory() if self.tokens.is_pinned() else numbers)

    def valid_tokens(self) -> Tensor:
        """Number of labels that carry a loss: int64 scalar on the rows' device."""
        return (self.labels != IGNORE_INDEX).sum()

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Of each field what `change` makes of it."""
        fields: dict[str, Any] = {name: None if field is None else change(field) for name, field in vars(self).items()}
        return Batch(**fields)


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of all, one batch after the other. They must have the same fields."""
    fields: dict[str, Any] = {}
    for name, first in vars(batches[0]).items():
        fields[name] = None if first is None else torch.cat([getattr(batch, name) for batch in batches])
    return Batch(**fields)
