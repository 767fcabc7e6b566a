"""Assigning windows to streams, as arithmetic on the counted sizes of the windows assigned before.

The number of tokens in a window is unknown before it is read. So windows are assigned on demand: at every multiple of
`period` rows per stream, each stream that would run short before the next one takes the next windows of the sequence,
in stream order, and some more to be read ahead. A window assigned ahead is counted by its reader at the next
assignment. The result is a function of the windows' sizes only: it does not depend on which processes count them, how
fast, or how many there are.

When no window is left and a stream would run short, the remaining data of all streams are laid end to end in stream
order and cut into as many equal spans as there are streams: the tail of the source. Its rows are assigned to the spans
round-robin, so a stream that reads every row stays in its span; in a mixture, where other sources end and rows move to
other streams, the row's number gives its position. A finite run ends with less than one row per stream of padding,
and no token is lost.

An *amount* is the unit of rows: tokens for rows that are cut out of documents laid end to end, whole rows for
packings that make their rows within a window. A row takes `need` amounts, and reads `overlap` more: the label of its
last token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

UNCOUNTED = -1


class Segment(NamedTuple):
    """A stretch of a window that a stream reads: amounts `begin` to `end`, or to the window's end if UNCOUNTED."""

    window: int
    begin: int
    end: int


class Skip(NamedTuple):
    """Documents of a damaged split that no row holds: `count` from number `first` on, or ALL that follow."""

    window: int
    split: int
    first: int
    documents: int


ALL = -1


class Tail(NamedTuple):
    """The last `rows` rows of a source. Its row first + j is row j // streams of span j mod streams."""

    first: int
    rows: int


@dataclass(frozen=True)
class Count:
    """The counted contents of a window."""

    amount: int
    documents: int = 0
    tokens: int = 0
    skips: tuple[Skip, ...] = ()
    leftovers: int = 0  # parts between documents that are none


@dataclass(frozen=True)
class Terms:
    """Constants of the assignment."""

    streams: int
    windows: int | None  # in all epochs together; None: without end
    windows_per_epoch: int
    need: int
    overlap: int


@dataclass(frozen=True)
class Assignment:
    """The contents of the streams after an assignment. Immutable: the next assignment makes a new one."""

    queues: tuple[tuple[Segment, ...], ...]  # of each stream, in the order it reads them
    begins: (
        np.ndarray
    )  # int64 [streams]: where in its stream's stream of amounts each queue begins; 0 for spans of a tail
    next_window: int = 0
    counted: Count = field(default_factory=lambda: Count(0))  # of all windows counted so far together
    windows_counted: int = 0
    empty_windows: int = 0  # counted in a row without any amount
    tail: Tail | None = None  # once the rest is divided: the queues are its spans

    @property
    def rows(self) -> int | None:
        """How many rows the source has in all; None until that is known."""
        return None if self.tail is None else self.tail.first + self.tail.rows

    @property
    def uncounted(self) -> list[tuple[int, int]]:
        """(stream, window) of each window that has not been counted yet."""
        return [(stream, s.window) for stream, queue in enumerate(self.queues) for s in queue if s.end == UNCOUNTED]


def nothing_assigned(streams: int) -> Assignment:
    """Before the first assignment."""
    return Assignment(((),) * streams, np.zeros(streams, np.int64))


CountWindows = Callable[[Sequence[tuple[int, int]]], Mapping[int, Count]]


def assign(
    before: Assignment, terms: Terms, done: np.ndarray, wanted: np.ndarray, ahead: np.ndarray, count: CountWindows
) -> Assignment:
    """The assignment after `done` rows of each stream (int64 `[streams]`).

    After it every stream holds `wanted` more rows, unless the data end, and about `ahead` more, in windows that may be
    uncounted. `count` returns the sizes of (stream, window) pairs; it is called with the same pairs on every rank.
    Raises ValueError when a whole epoch holds nothing.
    """
    assert before.tail is None, "nothing is assigned after the end"
    hand = _Hand(before, terms, done)
    hand.count(before.uncounted, count)
    while (short := hand.short(wanted)).any() and not hand.exhausted:
        hand.count(hand.take(short), count)
    if short.any():
        return hand.divided()
    hand.take(hand.short(ahead))
    return hand.assign()


class _Hand:
    """An assignment in progress."""

    def __init__(self, before: Assignment, terms: Terms, done: np.ndarray) -> None:
        self._before, self._terms, self._done = before, terms, done
        self._at = done * terms.need  # place of each stream in its stream
        self._begins = before.begins.copy()
        self._queues = [list(queue) for queue in before.queues]
        self._next = before.next_window
        self._totals, self._windows, self._empty = before.counted, before.windows_counted, before.empty_windows
        self._held = np.zeros(terms.streams, np.int64)  # counted amounts from each stream's place on
        for stream, queue in enumerate(self._queues):
            begin, at = int(self._begins[stream]), int(self._at[stream])
            read = 0
            for segment in queue:
                if segment.end == UNCOUNTED or begin + segment.end - segment.begin > at:
                    break
                begin += segment.end - segment.begin
                read += 1
            del queue[:read]
            self._begins[stream] = begin
            self._held[stream] = begin - at + sum(s.end - s.begin for s in queue if s.end != UNCOUNTED)

    @property
    def exhausted(self) -> bool:
        return self._terms.windows is not None and self._next >= self._terms.windows

    def short(self, rows: np.ndarray) -> np.ndarray:
        """Amounts that each stream lacks for so many more rows."""
        wanted = rows * self._terms.need + np.where(rows > 0, self._terms.overlap, 0)
        return np.maximum(wanted - self._held, 0)

    def take(self, short: np.ndarray) -> list[tuple[int, int]]:
        """Assign, stream after stream and round after round, as many windows as the shortage needs on average."""
        average = max(1, self._totals.amount // self._windows) if self._windows else max(1, int(short.max()))
        missing = -(-short // average)
        taken = []
        while missing.any() and not self.exhausted:
            for stream in np.flatnonzero(missing).tolist():
                if self.exhausted:
                    break
                self._queues[stream].append(Segment(self._next, 0, UNCOUNTED))
                taken.append((stream, self._next))
                self._next += 1
                missing[stream] -= 1
        return taken

    def count(self, pairs: Sequence[tuple[int, int]], count: CountWindows) -> None:
        if not pairs:
            return
        counts = count(pairs)
        for stream in sorted({stream for stream, _ in pairs}):
            queue = self._queues[stream]
            for place, segment in enumerate(queue):
                if segment.end == UNCOUNTED:
                    queue[place] = segment._replace(end=counts[segment.window].amount)
                    self._held[stream] += counts[segment.window].amount
        for _, window in sorted(pairs, key=lambda pair: pair[1]):
            found = counts[window]
            self._windows += 1
            self._empty = 0 if found.amount else self._empty + 1
            if self._empty >= self._terms.windows_per_epoch:
                raise ValueError(f"a whole epoch of {self._terms.windows_per_epoch} windows holds no row")
            total = self._totals
            self._totals = Count(
                total.amount + found.amount,
                total.documents + found.documents,
                total.tokens + found.tokens,
                total.skips + found.skips,
                total.leftovers + found.leftovers,
            )

    def assign(self) -> Assignment:
        queues = tuple(map(tuple, self._queues))
        return Assignment(queues, self._begins, self._next, self._totals, self._windows, self._empty)

    def divided(self) -> Assignment:
        """All that is left, cut into equal spans."""
        terms = self._terms
        rest: list[Segment] = []
        for queue, begin, at in zip(self._queues, self._begins.tolist(), self._at.tolist(), strict=True):
            for place, segment in enumerate(queue):
                used = at - begin if place == 0 else 0
                if segment.end > segment.begin + used:
                    rest.append(segment._replace(begin=segment.begin + used))
        edges = np.concatenate([[0], np.cumsum([s.end - s.begin for s in rest], dtype=np.int64)])
        total = int(edges[-1])
        rows = -(-max(0, total - terms.overlap) // terms.need)
        share, more = divmod(rows, terms.streams)
        spans = np.arange(terms.streams + 1)
        firsts = (spans * share + np.minimum(spans, more)).tolist()
        self._queues = []
        for first, after in pairwise(firsts):
            begin, end = first * terms.need, min(after * terms.need + terms.overlap, total)
            self._queues.append(_cut(rest, edges, begin, end) if after > first else [])
        return replace(self.assign(), begins=0 * self._begins, tail=Tail(int(self._done.sum()), rows))


def _cut(segments: Sequence[Segment], edges: np.ndarray, begin: int, end: int) -> list[Segment]:
    """Amounts `begin` to `end` of `segments` laid end to end; `edges`: where each begins, and where the last ends."""
    found = []
    place = int(np.searchsorted(edges, begin, side="right")) - 1
    while place < len(segments) and edges[place] < end:
        segment, edge = segments[place], int(edges[place])
        found.append(
            Segment(
                segment.window,
                segment.begin + max(0, begin - edge),
                min(segment.end, segment.begin + end - edge),
            )
        )
        place += 1
    return found


def to_json(assignment: Assignment) -> dict[str, Any]:
    """`assignment` as JSON values, queues flattened to [window, begin, end, ...]."""
    total = assignment.counted
    return {
        "queues": [[number for segment in queue for number in segment] for queue in assignment.queues],
        "begins": assignment.begins.tolist(),
        "next_window": assignment.next_window,
        "windows_counted": assignment.windows_counted,
        "empty_windows": assignment.empty_windows,
        "amount": total.amount,
        "documents": total.documents,
        "tokens": total.tokens,
        "leftovers": total.leftovers,
        "skips": [list(skip) for skip in total.skips],
        "tail": None if assignment.tail is None else list(assignment.tail),
    }


def from_json(state: Mapping[str, Any]) -> Assignment:
    """The inverse of `to_json`."""
    skips = tuple(Skip(*skip) for skip in state["skips"])
    return Assignment(
        queues=tuple(
            tuple(Segment(*flat[place : place + 3]) for place in range(0, len(flat), 3)) for flat in state["queues"]
        ),
        begins=np.array(state["begins"], np.int64),
        next_window=state["next_window"],
        counted=Count(state["amount"], state["documents"], state["tokens"], skips, state.get("leftovers", 0)),
        windows_counted=state["windows_counted"],
        empty_windows=state["empty_windows"],
        tail=None if state["tail"] is None else Tail(*state["tail"]),
    )
