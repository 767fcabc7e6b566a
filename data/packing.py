"""How documents become rows: the contents of a row under each packing, and the function that writes a row.

A row is made of pieces: stretches of one document each, one after the other. A row has `seq_len` places for tokens and
one more that only serves as the last label, so pieces of a row may have up to `seq_len + 1` tokens together; the
piece at the end of a row shares its last token with the next piece of the same document.

    concatenated   documents laid end to end and cut every seq_len tokens          no table: index.py cuts them
    best_fit       no document is cut that fits a row; short ones share a row      Table
    padded         a document to a row                                             Table

Under `best_fit` and `padded` a document longer than a row makes whole rows and a rest, which is packed like a document.
So every token of a document but its first is the label of exactly one place in an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stoker.data.rows import DOCUMENTS, LABELS, POSITIONS, TOKENS, WEIGHTS
from stoker.data.tokens import Array
from stoker.parallel.batch import IGNORE_INDEX

PACKINGS = ("concatenated", "best_fit", "padded")
PADDING = 0  # the token of padding: no real token attends to it, and it has no label


@dataclass(frozen=True)
class Pieces:
    """Stretches of an array of tokens and their rows, in order."""

    rows: np.ndarray  # int64 [pieces], rising; rows without a piece are padding
    begins: np.ndarray  # int64 [pieces], where each begins in the array
    lengths: np.ndarray  # int64 [pieces], at least 1, of sum `seq_len + 1` at most in each row


@dataclass(frozen=True)
class Table:
    """The pieces of all rows: those of row n are `firsts[n] : firsts[n + 1]`."""

    firsts: np.ndarray  # int64 [rows + 1]
    begins: np.ndarray  # int64 [pieces], in the array of all tokens
    lengths: np.ndarray  # int32 [pieces]

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def pieces(self, rows: np.ndarray) -> Pieces:
        """The pieces of `rows` (int64 `[n]`), which become the rows 0 .. n-1."""
        first, counts = self.firsts[rows], self.firsts[rows + 1] - self.firsts[rows]
        chosen = ranges(first, counts)
        return Pieces(
            np.repeat(np.arange(len(rows)), counts), self.begins[chosen], self.lengths[chosen].astype(np.int64)
        )


def fill(
    out: np.ndarray,
    tokens: Array,
    pieces: Pieces,
    document_mask: bool,
    learned: Array | None = None,
    weights: Array | None = None,
) -> None:
    """Write rows to `out`, int32 `[planes, rows, seq_len]` (see `stoker.data.rows`), overwriting it.

    `tokens` is the array of the pieces: anything that an int64 array can index, such as a mapped file. `learned`, of
    the same length, marks the tokens that are trained on; without it all are. `weights` (float32, of the same length)
    are written where `out` has the plane; without them 1. The label of a token is the one after it in its row. With
    `document_mask`, positions begin at 0 with each piece, and the last token of a piece has no label, unless the piece
    continues in the place after the row; without, the row is one run of text: positions run through it, and the first
    token of a piece is a label like any other. Pieces are numbered from 0 in each row; padding comes after them, with
    the next number and no label.
    """
    planes, rows, seq_len = out.shape
    width = seq_len + 1
    held = np.bincount(pieces.rows, pieces.lengths, rows).astype(np.int64)
    assert held.max(initial=0) <= width
    ends = np.cumsum(pieces.lengths)
    begin_of_row = np.concatenate([[0], np.cumsum(held)])[:-1]
    places = ends - pieces.lengths - begin_of_row[pieces.rows]  # of each piece in its row
    source = ranges(pieces.begins, pieces.lengths)
    target = ranges(pieces.rows * width + places, pieces.lengths)

    laid = np.full((rows, width), PADDING, np.int32)
    laid.reshape(-1)[target] = tokens[source]
    labels = np.full((rows, width), IGNORE_INDEX, np.int32)
    flat = labels.reshape(-1)
    flat[target] = laid.reshape(-1)[target]
    if learned is not None:
        flat[target[~learned[source].astype(bool)]] = IGNORE_INDEX

    begun = np.zeros((rows, width + 1), np.int32)  # 1 where a piece, or the padding, begins
    begun.reshape(-1)[pieces.rows * (width + 1) + places] = 1
    if document_mask:
        labels[begun[:, :width] == 1] = IGNORE_INDEX
    begun[np.arange(rows), held] = 1
    begun[:, 0] = 0
    out[TOKENS] = laid[:, :seq_len]
    out[LABELS] = labels[:, 1:]
    if planes > WEIGHTS:
        factors = np.ones((rows, width), np.float32)
        if weights is not None:
            factors.reshape(-1)[target] = weights[source]
        out[WEIGHTS] = factors[:, 1:].view(np.int32)
    np.cumsum(begun[:, :seq_len], axis=1, out=out[DOCUMENTS])
    place = np.arange(seq_len, dtype=np.int32)
    out[POSITIONS] = place
    if document_mask:
        out[POSITIONS] -= np.maximum.accumulate(place * begun[:, :seq_len], axis=1)


def best_fit(begins: np.ndarray, lengths: np.ndarray, seq_len: int) -> Table:
    """Rows of whole documents (int64 `[documents]`: first token, number of tokens), as few as best fit finds.

    Best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). Whole rows of long documents
    come first, then the others, by falling length of their longest document.
    """
    whole, rest = _cut(begins, lengths, seq_len)
    bins = fit(rest[1], seq_len)
    order = np.argsort(bins, kind="stable")
    counts = np.bincount(bins) if len(bins) else np.empty(0, np.int64)
    return _table(np.concatenate([np.ones(len(whole[0]), np.int64), counts]), whole, (rest[0][order], rest[1][order]))


def padded(begins: np.ndarray, lengths: np.ndarray, seq_len: int) -> Table:
    """A row for each document (int64 `[documents]`: first token, number of tokens), or for each part of a long one."""
    whole, rest = _cut(begins, lengths, seq_len)
    return _table(np.ones(len(whole[0]) + len(rest[0]), np.int64), whole, rest)


def together(begins: np.ndarray, lengths: np.ndarray, seq_len: int, count: int, shared: bool) -> Table:
    """Rows of whole groups of `count` documents in turn (int64 `[documents]`: first token, number of tokens).

    Groups of more than `seq_len` tokens are left out. With `shared` a row has as many groups as best fit finds, else
    one.
    """
    begins, lengths = (np.asarray(array, np.int64).reshape(-1, count) for array in (begins, lengths))
    kept = lengths.sum(1) <= seq_len
    begins, lengths = begins[kept], lengths[kept]
    bins = fit(lengths.sum(1), seq_len) if shared else np.arange(len(begins))
    order = np.argsort(bins, kind="stable")
    counts = np.bincount(bins) * count if len(bins) else np.empty(0, np.int64)
    return _table(counts, (begins[order].reshape(-1), lengths[order].reshape(-1)))


def fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Into which bin of `capacity` each of `lengths` (in 1 .. capacity) goes under best-fit decreasing: int64.

    All items of one length are placed at once. The fullest bin that has room for one takes as many as fit, because
    it stays the fullest; so all bins with equal room are equivalent, and the work is one array operation for each pair
    of a length and a room that occurs: millions of items in a second.
    """
    lengths = np.asarray(lengths, np.int64)
    assert not len(lengths) or (lengths.min() >= 1 and lengths.max() <= capacity)
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    placed = np.empty(len(lengths), np.int64)  # by falling length
    open_bins: dict[int, list[np.ndarray]] = {}  # bins by the room they have left
    rooms = 0  # bit r: there are bins with room r
    done = bins = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        items = int(counts[length])
        while items:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // length
            wanted = -(-items // each)
            if fitting:
                found = np.concatenate(open_bins.pop(room))
                rooms ^= 1 << room
            else:
                found = np.arange(bins, bins + wanted)
                bins += wanted
            taken, left = found[:wanted], found[wanted:]
            here = min(items, len(taken) * each)
            placed[done : done + here] = np.repeat(taken, each)[:here]
            done, items = done + here, items - here
            full, some = divmod(here, each)
            for group, space in (
                (taken[:full], room - each * length),
                (taken[full:], room - some * length),
                (left, room),
            ):
                if len(group) and space:
                    open_bins.setdefault(space, []).append(group)
                    rooms |= 1 << space
    result = np.empty(len(lengths), np.int64)
    result[order] = placed
    return result


def ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`begin, begin + 1, ..., begin + length - 1` for each pair, one after the other: int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(np.asarray(begins, np.int64) - (ends - lengths), lengths)


def _cut(
    begins: np.ndarray, lengths: np.ndarray, seq_len: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Whole rows of the documents that are longer than one, and the rest of each document: (begins, lengths) each.

    A whole row includes the token after it, as its last label. A rest of only that token is left out: it has no further
    label.
    """
    begins, lengths = np.asarray(begins, np.int64), np.asarray(lengths, np.int64)
    rows = np.maximum(lengths - 1, 0) // seq_len
    first = np.cumsum(rows) - rows
    number = np.arange(int(rows.sum())) - np.repeat(first, rows)
    whole = np.repeat(begins, rows) + number * seq_len
    kept = lengths > rows * seq_len + (rows > 0)
    rest = (begins + rows * seq_len)[kept], (lengths - rows * seq_len)[kept]
    return (whole, np.full(len(whole), seq_len + 1)), rest


def _table(counts: np.ndarray, *parts: tuple[np.ndarray, np.ndarray]) -> Table:
    begins, lengths = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Table(np.concatenate([[0], np.cumsum(counts)]), begins, lengths.astype(np.int32))
