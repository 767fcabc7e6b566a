"""The index planner: rows of counted tokens in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.cache import Tokens
from data.rows import DOCUMENTS, LABELS, POSITIONS, TOKENS
from data.shuffle import permute
from parallel.rows import IGNORE


@dataclass(frozen=True)
class IndexPlan:
    """Rows cut out of `tokens` every `seq_len` tokens; the last few tokens, if they fill no row, are in none.

    Implements `data.rows.RowPlan`. `numbers` of rows run on through the epochs.
    """

    name: str  # of the source
    tokens: Tokens
    seq_len: int
    seed: int | None  # of the order of each epoch; None: in the order of the tokens
    epochs: int | None  # None: without end
    document_mask: bool
    fingerprint: Mapping[str, Any]

    @property
    def rows_per_epoch(self) -> int:
        return max(0, len(self.tokens.ids) - 1) // self.seq_len

    @property
    def total_rows(self) -> int | None:
        return None if self.epochs is None else self.epochs * self.rows_per_epoch

    def counts(self, row: int) -> dict[str, dict[str, int]]:
        return {self.name: {"rows": row, "epoch": row // self.rows_per_epoch}}

    def read(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """See `RowPlan.read`.

        Documents are numbered from 0 within each row. With `document_mask`, positions begin at 0 with each of them, and
        the end of a document has no label; without, the row is one run of text: positions run through it, and the first
        token of the next document is a label like any other.
        """
        length = self.seq_len
        begins = self._windows(numbers) * length
        firsts = np.searchsorted(self.tokens.starts, begins, side="right")  # first document to begin inside the row
        lasts = np.searchsorted(self.tokens.starts, begins + length, side="right")
        begun = np.zeros((len(numbers), length + 1), np.int32)  # 1 where a document begins, labels included
        for row, (begin, first, last) in enumerate(zip(begins.tolist(), firsts, lasts, strict=True)):
            window = self.tokens.ids[begin : begin + length + 1]
            out[TOKENS, row] = window[:-1]
            out[LABELS, row] = window[1:]
            begun[row, self.tokens.starts[first:last] - begin] = 1
        np.cumsum(begun[:, :-1], axis=1, out=out[DOCUMENTS])
        place = np.arange(length, dtype=np.int32)
        out[POSITIONS] = place
        if self.document_mask:
            out[POSITIONS] -= np.maximum.accumulate(place * begun[:, :-1], axis=1)
            out[LABELS][begun[:, 1:] == 1] = IGNORE

    def _windows(self, numbers: np.ndarray) -> np.ndarray:
        """Which stretch of the tokens each row is."""
        epochs, windows = np.divmod(numbers, self.rows_per_epoch)
        if self.seed is not None:
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                windows[chosen] = permute(windows[chosen], self.rows_per_epoch, self.seed, epoch)
        return windows
