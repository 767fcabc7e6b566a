"""The index mode: rows of counted tokens in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stoker.data.packing import Pieces, Table, fill, ranges
from stoker.data.shuffle import permute
from stoker.data.taught import TaughtRows
from stoker.data.tokens import Tokens


@dataclass(frozen=True)
class IndexPlan:
    """The rows of one source: those of `table`, or, without one, the tokens cut every `seq_len`.

    Implements `stoker.data.rows.RowPlan`. `numbers` of rows continue through the epochs. Without a table the last few
    tokens, if they fill no row, are in none.
    """

    name: str  # of the source
    tokens: Tokens
    seq_len: int
    seed: int | None  # of the order of each epoch; None: in the order of the tokens
    epochs: int | None  # None: without end
    document_mask: bool
    fingerprint: Mapping[str, Any]
    table: Table | None = None
    left_out: int | None = 0  # documents without text, which are in no row; None: not counted
    teacher: TaughtRows | None = None  # its predictions

    @property
    def weighted(self) -> bool:
        return self.tokens.weights is not None

    @property
    def taught(self) -> int:
        return 0 if self.teacher is None else self.teacher.planes

    @property
    def documents_together(self) -> int:
        return self.tokens.documents_together

    @property
    def rows_per_epoch(self) -> int:
        if self.table is not None:
            return len(self.table)
        return max(0, len(self.tokens.ids) - 1) // self.seq_len

    @property
    def tokens_in_no_row(self) -> int:
        """Tokens at the end that fill no row, and are in none; the last of a row is the first of the next one."""
        return 0 if self.table is not None else max(0, len(self.tokens.ids) - 1 - self.rows_per_epoch * self.seq_len)

    @property
    def total_rows(self) -> int | None:
        return None if self.epochs is None else self.epochs * self.rows_per_epoch

    def counts(self, row: int) -> dict[str, dict[str, int]]:
        found = {"rows": row, "epoch": row // self.rows_per_epoch}
        return {self.name: found if self.left_out is None else {**found, "leftovers": self.left_out}}

    def history(self, row: int) -> None:
        return None

    def resume(self, history: None, row: int, step: int) -> None:
        """A single source has no history."""

    def read(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """See `RowPlan.read` and `stoker.data.packing.fill`."""
        tokens, own = self.tokens, len(out) - self.taught
        if self.teacher is not None:
            self.teacher.read(self._shuffled(numbers), out[own:])
        fill(out[:own], tokens.ids, self.pieces(numbers), self.document_mask, tokens.learned, tokens.weights)

    def pieces(self, numbers: np.ndarray) -> Pieces:
        """The pieces of the rows `numbers`."""
        rows = self._shuffled(numbers)
        if self.table is not None:
            return self.table.pieces(rows)
        begins = rows * self.seq_len
        ends = begins + self.seq_len + 1
        firsts = np.searchsorted(self.tokens.starts, begins, side="right")  # first document to begin inside the row
        inside = np.searchsorted(self.tokens.starts, ends, side="left") - firsts
        owners = np.repeat(np.arange(len(rows)), inside + 1)
        cuts = np.empty(len(owners), np.int64)
        after = np.cumsum(inside + 1)  # where each row's pieces end in `cuts`
        places = after - (inside + 1)
        cuts[places] = begins
        others = np.ones(len(cuts), bool)
        others[places] = False
        cuts[others] = self.tokens.starts[ranges(firsts, inside)]
        following = np.append(cuts[1:], 0)
        following[after - 1] = ends
        return Pieces(owners, cuts, following - cuts)

    def _shuffled(self, numbers: np.ndarray) -> np.ndarray:
        """The row of the tokens, or of the table, for each row."""
        epochs, rows = np.divmod(numbers, self.rows_per_epoch)
        if self.seed is not None:
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                rows[chosen] = permute(rows[chosen], self.rows_per_epoch, self.seed, epoch)
        return rows
