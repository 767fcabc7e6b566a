"""Rows of lanes: windows dealt, read and laid end to end, and rows cut out of them.

`LaneRows` is what all ranks do in step: it turns a `Place` in the sequence of rows into the rows that follow and the
place after them. A place is all the state there is. It never changes, so any number of them can be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from data.lanes.dealing import UNCOUNTED, Count, Deal, Segment, Skip, Terms, deal, nothing_dealt
from data.lanes.exchange import Exchange
from data.lanes.mixing import LaneMixture
from data.lanes.packed import NOTHING, Packed, Packing
from data.lanes.readers import Key, WindowReaders
from data.lanes.windows import Windows


@dataclass(frozen=True)
class Place:
    """A place in the sequence of rows: after `rows` rows of each lane."""

    rows: int
    deals: tuple[Deal, ...]  # of each source
    done: tuple[np.ndarray, ...]  # of each source, int64 [lanes]: rows that each lane has taken from it


@dataclass(frozen=True)
class Shape:
    """What decides which row is which, besides the sources."""

    lanes: int
    period: int  # rows of each lane from dealing to dealing
    packing: Packing


@dataclass
class Counters:
    """What reading took so far, over all ranks. It depends on where a run runs, so it is no part of a place."""

    bytes: int = 0
    retries: int = 0


class LaneRows:
    """The rows of the lanes l with l mod dp = dp_rank, as tokens and what each of them is."""

    def __init__(
        self,
        sources: Sequence[Windows],
        shape: Shape,
        mixture: LaneMixture,
        dp_rank: int,
        dp: int,
        readers: WindowReaders | None,
        exchange: Exchange,
    ) -> None:
        """`readers` is None on a rank that does not read. Raises ValueError when the lanes do not divide over dp."""
        if shape.lanes % dp:
            raise ValueError(f"data.lanes={shape.lanes} do not divide over {dp} data-parallel ranks")
        self._sources, self._shape, self._mixture = sources, shape, mixture
        self._mine = range(dp_rank, shape.lanes, dp)
        self._readers, self._exchange = readers, exchange
        self._held: dict[Key, Packed] = {}
        self._asked: set[Key] = set()
        self.counters = Counters()
        self._unreported = Counters()  # of this rank
        self._terms = [
            Terms(shape.lanes, source.total, source.per_epoch, shape.packing.need, shape.packing.overlap)
            for source in sources
        ]

    def start(self) -> Place:
        """The place before the first row."""
        lanes = self._shape.lanes
        return Place(
            0,
            tuple(nothing_dealt(lanes) for _ in self._sources),
            tuple(np.zeros(lanes, np.int64) for _ in self._sources),
        )

    def forget(self) -> None:
        """Drop what was read: the next place is another one."""
        if self._readers is not None:
            self._readers.discard()
        self._held.clear()
        self._asked.clear()

    def read(self, place: Place, rows: int, out: np.ndarray) -> Place | None:
        """Write the `rows` rows of each lane that follow `place`, and return the place after them.

        `out` is int32 `[2, rows * lanes / dp, seq_len + 1]`: tokens, and what each is (CONTINUES, BEGINS or NOTHING).
        None when there are no more rows. Raises Damaged, ValueError or RuntimeError for data that cannot be read.
        """
        out[0], out[1] = 0, NOTHING
        shape, first = self._shape, place.rows
        here = len(self._mine)
        for number in range(rows):
            row = (first + number) * shape.lanes
            if (first + number) % shape.period == 0 or self._mixture.changes_at(row):
                place = self._deal(place)
            if self._ended(place):
                return None if number == 0 else place
            of = self._mixture.assign(row + np.arange(shape.lanes))
            if self._exchange.reads:
                self._hold(place)
                for slot, lane in enumerate(self._mine):
                    self._write(place, int(of[lane]), lane, out[:, number * here + slot])
            done = tuple(taken + (of == source) for source, taken in enumerate(place.done))
            place = replace(place, rows=place.rows + 1, done=done)
        return place

    def _ended(self, place: Place) -> bool:
        ends = [d.last_rows for d in place.deals]
        return any(end is not None and place.rows >= int(end.max()) for end in ends)

    def _deal(self, place: Place) -> Place:
        """The dealings at `place`, the first row of a period, or of other weights."""
        shape = self._shape
        coming = place.rows * shape.lanes + np.arange(2 * shape.period * shape.lanes)
        of = self._mixture.assign(coming).reshape(2 * shape.period, shape.lanes)
        deals = []
        for number, (terms, before, done) in enumerate(zip(self._terms, place.deals, place.done, strict=True)):
            if before.last_rows is not None:
                deals.append(before)
                continue
            wanted, ahead = (of[: shape.period] == number).sum(0), (of == number).sum(0)
            deals.append(deal(before, terms, done, wanted, ahead, partial(self._count, number)))
        return replace(place, deals=tuple(deals))

    def _count(self, number: int, pairs: Sequence[tuple[int, int]]) -> Mapping[int, Count]:
        """Read the windows of this rank's lanes, and tell and hear what they hold."""
        mine = [(number, window) for lane, window in pairs if lane in self._mine]
        message: list[int] = []
        if self._readers is not None:
            for key in mine:
                self._ask(key, None)
            for key in mine:
                found = self._take(key)
                window = found.window
                message += [key[1], found.amount, len(window.starts), len(window.ids), len(window.skips)]
                message += [value for skip in window.skips for value in skip[1:]]
        message = [len(message), self._unreported.bytes, self._unreported.retries, *message]
        self._unreported = Counters()
        return self._heard(self._exchange.gather(np.array(message, np.int64)).tolist())

    def _heard(self, values: list[int]) -> dict[int, Count]:
        counts: dict[int, Count] = {}
        place = 0
        while place < len(values):
            end = place + 3 + values[place]
            self.counters.bytes += values[place + 1]
            self.counters.retries += values[place + 2]
            place += 3
            while place < end:
                window, amount, documents, tokens, skips = values[place : place + 5]
                place += 5
                found = [Skip(window, *values[place + 3 * n : place + 3 * n + 3]) for n in range(skips)]
                place += 3 * skips
                counts[window] = Count(amount, documents, tokens, tuple(found))
        return counts

    def _hold(self, place: Place) -> None:
        """Have every window that this rank's lanes still need asked for, and no other in memory."""
        needed: dict[Key, tuple[int, Segment]] = {}
        for number, (terms, dealt, done) in enumerate(zip(self._terms, place.deals, place.done, strict=True)):
            queues = [(lane, dealt.queues[lane]) for lane in self._mine]
            for depth in range(max((len(queue) for _, queue in queues), default=0)):
                for lane, queue in queues:
                    if depth < len(queue) and _end(dealt, lane, depth) > int(done[lane]) * terms.need:
                        needed[number, queue[depth].window] = (lane, queue[depth])
        for key in self._held.keys() - needed.keys():
            del self._held[key]
        for key, (_, segment) in needed.items():
            if key not in self._held and key not in self._asked:
                self._ask(key, None if segment.end == UNCOUNTED else self._skips(place, key))

    def _skips(self, place: Place, key: Key) -> list[Skip]:
        return [skip for skip in place.deals[key[0]].counted.skips if skip.window == key[1]]

    def _ask(self, key: Key, known: Sequence[Skip] | None) -> None:
        assert self._readers is not None
        if key not in self._asked and key not in self._held:
            self._readers.ask(key, known)
            self._asked.add(key)

    def _take(self, key: Key) -> Packed:
        assert self._readers is not None
        if key not in self._held:
            window = self._readers.take(key)
            self._held[key] = Packed(window, self._shape.packing)
            self._unreported.bytes += window.bytes
            self._unreported.retries += window.retries
            self._asked.discard(key)
        return self._held[key]

    def _write(self, place: Place, number: int, lane: int, out: np.ndarray) -> None:
        """The next row of `lane`, from a source: int32 `[2, seq_len + 1]`. Where the data end it stays empty."""
        dealt, need = place.deals[number], self._terms[number].need
        if dealt.last_rows is not None and place.done[number][lane] >= dealt.last_rows[lane]:
            return
        at, written = int(place.done[number][lane]) * need, 0
        for segment, begin in _segments(dealt, lane):
            length = segment.end - segment.begin
            skipped = max(0, at - begin)
            if skipped >= length:
                continue
            window = self._take((number, segment.window))
            self._check(number, dealt, segment, window)
            taken, written = window.write(segment.begin + skipped, length - skipped, out, written)
            at += taken
            if written == out.shape[1]:
                return
        assert dealt.last_rows is not None, "a lane ran dry before its next dealing"

    def _check(self, number: int, dealt: Deal, segment: Segment, window: Packed) -> None:
        held = window.amount
        if held < segment.end or (dealt.last_rows is None and held != segment.end):
            source = self._sources[number]
            raise ValueError(
                f"{source.name}: the units {source.units_of(segment.window)} make {held} and made {segment.end} "
                f"{'tokens' if self._terms[number].overlap else 'rows'} when they were read first: the data changed"
            )


def _segments(dealt: Deal, lane: int) -> Iterator[tuple[Segment, int]]:
    """The counted segments of a lane, each with its place in the lane's stream."""
    begin = int(dealt.begins[lane])
    for segment in dealt.queues[lane]:
        if segment.end == UNCOUNTED:
            return
        yield segment, begin
        begin += segment.end - segment.begin


def _end(dealt: Deal, lane: int, depth: int) -> float:
    """Where a segment ends in its lane's stream; infinite when it is not counted."""
    queue = dealt.queues[lane][: depth + 1]
    if queue[-1].end == UNCOUNTED:
        return float("inf")
    return int(dealt.begins[lane]) + sum(segment.end - segment.begin for segment in queue)
