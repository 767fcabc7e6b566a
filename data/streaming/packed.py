"""A window's documents as amounts: tokens laid end to end, or the rows of a packing.

Rows are broadcast in a model-parallel group as tokens and their kinds, two int32 numbers for each place, from which
every rank computes the planes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stoker.data.packing import Pieces, Table, best_fit, fill, padded
from stoker.data.streaming.shuffle_windows import Window

CONTINUES, BEGINS, NOTHING = range(3)  # kinds of tokens: inside a piece of a document, its first, or padding


@dataclass(frozen=True)
class Packing:
    """How windows become rows of `seq_len` tokens. A row takes `need` amounts of a stream, and reads `overlap` more."""

    name: str  # concatenated | best_fit | padded
    seq_len: int

    @property
    def need(self) -> int:
        return self.seq_len if self.name == "concatenated" else 1

    @property
    def overlap(self) -> int:
        return 1 if self.name == "concatenated" else 0


class Packed:
    """A window under a packing."""

    def __init__(self, window: Window, packing: Packing) -> None:
        self.window, self._packing = window, packing

    @cached_property
    def _table(self) -> Table | None:
        starts, packing = self.window.starts, self._packing
        if packing.name == "concatenated":
            return None
        lengths = np.diff(np.append(starts, len(self.window.ids)))
        return (best_fit if packing.name == "best_fit" else padded)(starts, lengths, packing.seq_len)

    @property
    def amount(self) -> int:
        """How many tokens, or rows, it makes."""
        return len(self.window.ids) if self._table is None else len(self._table)

    def write(self, first: int, most: int, out: np.ndarray, written: int) -> tuple[int, int]:
        """Continue the row `out` (int32 `[2, seq_len + 1]`, `written` tokens so far) from amount `first` on, taking
        `most` amounts at most; the amounts taken and the tokens written now."""
        if self._table is None:
            taken = min(most, out.shape[1] - written)
            self._lay(first, taken, out, written)
            inside = slice(*np.searchsorted(self.window.starts, (first, first + taken)))
            out[1, written + self.window.starts[inside] - first] = BEGINS
            return taken, written + taken
        pieces = self._table.pieces(np.array([first]))
        for begin, length in zip(pieces.begins.tolist(), pieces.lengths.tolist(), strict=True):
            self._lay(begin, length, out, written)
            out[1, written] = BEGINS
            written += length
        return 1, out.shape[1]

    def _lay(self, first: int, length: int, out: np.ndarray, at: int) -> None:
        out[0, at : at + length] = self.window.ids[first : first + length]
        out[1, at : at + length] = CONTINUES


def planes(laid: np.ndarray, document_mask: bool) -> np.ndarray:
    """The rows `laid` (int32 `[2, rows, seq_len + 1]`: tokens and their kinds) as int32 `[4, rows, seq_len]`."""
    tokens, kinds = laid
    rows, width = tokens.shape
    begun = kinds == BEGINS
    begun[:, 0] = kinds[:, 0] != NOTHING
    row, place = np.nonzero(begun)
    held = (kinds != NOTHING).sum(1)
    last = np.append(row[1:] != row[:-1], True)[: len(row)]  # of its row
    ends = np.where(last, held[row], np.append(place[1:], 0)[: len(row)])
    out = np.empty((4, rows, width - 1), np.int32)
    fill(out, tokens.reshape(-1), Pieces(row, row * width + place, ends - place), document_mask)
    return out
