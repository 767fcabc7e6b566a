"""Rows of streams: windows assigned, read and laid end to end, and rows cut out of them.

`StreamRows` runs on all ranks in lockstep: it turns a `Place` in the sequence of rows into the rows that follow and the
place after them. A place is the whole state. It is immutable, so any number of them can be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from stoker.data.streaming.assignment import (
    UNCOUNTED,
    Assignment,
    Count,
    Segment,
    Skip,
    Terms,
    assign,
    nothing_assigned,
)
from stoker.data.streaming.exchange import Exchange
from stoker.data.streaming.mixing import NO_SOURCE, Limits, StreamMixture
from stoker.data.streaming.packed import NOTHING, Packed, Packing
from stoker.data.streaming.readers import Key, WindowReaders
from stoker.data.streaming.shuffle_windows import ShuffleWindows


@dataclass(frozen=True)
class Place:
    """A place in the sequence of rows: after `rows` rows of each stream."""

    rows: int
    assignments: tuple[Assignment, ...]  # of each source
    done: tuple[np.ndarray, ...]  # of each source, int64 [streams]: rows that each stream has taken from it

    @property
    def limits(self) -> Limits:
        """Rows of each source in all, as far as they are known."""
        return tuple(assign.rows for assign in self.assignments)


@dataclass(frozen=True)
class Shape:
    """Settings that decide the rows, beside the sources."""

    streams: int
    period: int  # rows of each stream from assignment to assignment
    packing: Packing


@dataclass
class Counters:
    """Totals of reading so far, over all ranks. They depend on the machines, so they are no part of a place."""

    bytes: int = 0
    retries: int = 0


@dataclass(frozen=True)
class _Coming:
    """The plan of the rows from row `first` of each stream on."""

    first: int
    limits: Limits
    sources: np.ndarray  # int64 [rows, streams]
    numbers: np.ndarray  # int64 [rows, streams]: which row of its source each is
    tails: dict[Key, tuple[int, Segment]]  # of this rank's streams, for rows in a source's tail


class StreamRows:
    """The rows of the streams l with l mod dp = dp_rank, as tokens and their kinds."""

    def __init__(
        self,
        sources: Sequence[ShuffleWindows],
        shape: Shape,
        mixture: StreamMixture,
        dp_rank: int,
        dp: int,
        readers: WindowReaders | None,
        exchange: Exchange,
        skip_limit: int,
    ) -> None:
        """`readers` is None on a rank that does not read; `skip_limit`: skips of a source that may be recorded.

        Raises ValueError when the streams do not divide over dp.
        """
        if shape.streams % dp:
            raise ValueError(f"data.streams={shape.streams} do not divide over {dp} data-parallel ranks")
        self._sources, self._shape, self._mixture = sources, shape, mixture
        self._mine = range(dp_rank, shape.streams, dp)
        self._readers, self._exchange, self._skip_limit = readers, exchange, skip_limit
        self._held: dict[Key, Packed] = {}
        self._asked: set[Key] = set()
        self._seen: _Coming | None = None
        self.counters = Counters()
        self._unreported = Counters()  # of this rank
        self._terms = [
            Terms(shape.streams, source.total, source.per_epoch, shape.packing.need, shape.packing.overlap)
            for source in sources
        ]

    def start(self) -> Place:
        """The place before the first row."""
        streams = self._shape.streams
        return Place(
            0,
            tuple(nothing_assigned(streams) for _ in self._sources),
            tuple(np.zeros(streams, np.int64) for _ in self._sources),
        )

    def forget(self) -> None:
        """Drop windows that were read: the next place is another one."""
        if self._readers is not None:
            self._readers.discard()
        self._held.clear()
        self._asked.clear()
        self._seen = None

    def read(self, place: Place, rows: int, out: np.ndarray) -> Place | None:
        """Write the `rows` rows of each stream that follow `place`, and return the place after them.

        `out` is int32 `[2, rows * streams / dp, seq_len + 1]`: tokens and their kinds (CONTINUES, BEGINS or NOTHING).
        None when there are no more rows. Raises Damaged, ValueError or RuntimeError for data that cannot be read.
        """
        out[0], out[1] = 0, NOTHING
        shape, first = self._shape, place.rows
        here = len(self._mine)
        for number in range(rows):
            row = (first + number) * shape.streams
            if (first + number) % shape.period == 0 or self._mixture.changes_at(row):
                place = self._assign(place)
            if self._ended(place):
                return None if number == 0 else place
            coming = self._coming(place)
            of, numbers = (part[place.rows - coming.first] for part in (coming.sources, coming.numbers))
            if self._exchange.reads:
                self._hold(place, coming)
                for slot, stream in enumerate(self._mine):
                    if of[stream] != NO_SOURCE:
                        self._write(place, int(of[stream]), int(numbers[stream]), stream, out[:, number * here + slot])
            done = tuple(taken + (of == source) for source, taken in enumerate(place.done))
            place = replace(place, rows=place.rows + 1, done=done)
        return place

    def _ended(self, place: Place) -> bool:
        end = self._mixture.total_rows(place.limits)
        return end is not None and place.rows * self._shape.streams >= end

    def _coming(self, place: Place) -> _Coming:
        """The rows after `place`, two periods of them after a new lookup, and fewer after some were read."""
        seen, shape = self._seen, self._shape
        if seen is not None and seen.limits == place.limits and 0 <= place.rows - seen.first < shape.period:
            return seen
        count = 2 * shape.period
        rows = place.rows * shape.streams + np.arange(count * shape.streams)
        sources, numbers = (part.reshape(count, shape.streams) for part in self._mixture.assign(rows, place.limits))
        self._seen = _Coming(place.rows, place.limits, sources, numbers, self._tails(place, sources, numbers))
        return self._seen

    def _tails(self, place: Place, sources: np.ndarray, numbers: np.ndarray) -> dict[Key, tuple[int, Segment]]:
        needed: dict[Key, tuple[int, Segment]] = {}
        for source, assigned in enumerate(place.assignments):
            if assigned.tail is None:
                continue
            terms = self._terms[source]
            mine = slice(self._mine.start, None, self._mine.step)
            for number in numbers[:, mine][sources[:, mine] == source].tolist():
                queue, at = self._place_in_tail(assigned, number, terms.need)
                for segment, begin in _segments(assigned, queue):
                    if begin < at + terms.need + terms.overlap and at < begin + segment.end - segment.begin:
                        needed.setdefault((source, segment.window), (queue, segment))
        return needed

    def _place_in_tail(self, assigned: Assignment, number: int, need: int) -> tuple[int, int]:
        """The span that holds row `number` of a source, and the amount in it that the row begins with."""
        assert assigned.tail is not None and assigned.tail.first <= number < assigned.tail.first + assigned.tail.rows
        row, span = divmod(number - assigned.tail.first, self._shape.streams)
        return span, row * need

    def _assign(self, place: Place) -> Place:
        """The assignments at `place`, the first row of a period, or of other weights."""
        shape = self._shape
        if self._seen is not None and self._seen.first < place.rows:
            self._seen = None
        while True:
            of = self._coming(place).sources
            assignments = []
            for number, (terms, before, done) in enumerate(
                zip(self._terms, place.assignments, place.done, strict=True)
            ):
                if before.tail is not None:
                    assignments.append(before)
                    continue
                wanted, ahead = (of[: shape.period] == number).sum(0), (of == number).sum(0)
                assignments.append(assign(before, terms, done, wanted, ahead, partial(self._count, number)))
                self._refuse_many_skips(number, assignments[-1])
            limits, place = place.limits, replace(place, assignments=tuple(assignments))
            if place.limits == limits:
                return place
            # A source will end: others replace it, and may need more windows now.

    def _refuse_many_skips(self, number: int, assigned: Assignment) -> None:
        """Limit the number of skips, all of which are in the state. Raises on all ranks."""
        skips = assigned.counted.skips
        if len(skips) > self._skip_limit:
            source, last = self._sources[number], skips[-1]
            raise ValueError(
                f"{source.name}: {len(skips)} skips in {assigned.windows_counted} windows, more than "
                f"data.skip_limit={self._skip_limit}, the last in split {last.split}: the log names each of them"
            )

    def _count(self, number: int, pairs: Sequence[tuple[int, int]]) -> Mapping[int, Count]:
        """Read the windows of this rank's streams, and exchange their counts with the other ranks."""
        mine = [(number, window) for stream, window in pairs if stream in self._mine]
        message: list[int] = []
        if self._readers is not None:
            for key in mine:
                self._ask(key, None)
            for key in mine:
                found = self._take(key)
                window = found.window
                message += [key[1], found.amount, len(window.starts), len(window.ids), window.leftovers]
                message += [len(window.skips)]
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
                window, amount, documents, tokens, leftovers, skips = values[place : place + 6]
                place += 6
                found = [Skip(window, *values[place + 3 * n : place + 3 * n + 3]) for n in range(skips)]
                place += 3 * skips
                counts[window] = Count(amount, documents, tokens, tuple(found), leftovers)
        return counts

    def _hold(self, place: Place, coming: _Coming) -> None:
        """Request every window that this rank's streams still need, and drop all others from memory."""
        needed: dict[Key, tuple[int, Segment]] = {}
        for number, (terms, assigned, done) in enumerate(zip(self._terms, place.assignments, place.done, strict=True)):
            if assigned.tail is not None:
                continue
            queues = [(stream, assigned.queues[stream]) for stream in self._mine]
            for depth in range(max((len(queue) for _, queue in queues), default=0)):
                for stream, queue in queues:
                    if depth < len(queue) and _end(assigned, stream, depth) > int(done[stream]) * terms.need:
                        needed[number, queue[depth].window] = (stream, queue[depth])
        needed |= coming.tails
        for key in self._held.keys() - needed.keys():
            del self._held[key]
        for key, (_, segment) in needed.items():
            if key not in self._held and key not in self._asked:
                self._ask(key, None if segment.end == UNCOUNTED else self._skips(place, key))

    def _skips(self, place: Place, key: Key) -> list[Skip]:
        return [skip for skip in place.assignments[key[0]].counted.skips if skip.window == key[1]]

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

    def _write(self, place: Place, source: int, number: int, stream: int, out: np.ndarray) -> None:
        """Row `number` of a source, the next one for `stream`: int32 `[2, seq_len + 1]`, empty where it ends."""
        assigned, need, written = place.assignments[source], self._terms[source].need, 0
        if assigned.tail is None:
            queue, at = stream, int(place.done[source][stream]) * need
        else:
            queue, at = self._place_in_tail(assigned, number, need)
        for segment, begin in _segments(assigned, queue):
            length = segment.end - segment.begin
            skipped = max(0, at - begin)
            if skipped >= length:
                continue
            window = self._take((source, segment.window))
            self._check(source, assigned, segment, window)
            taken, written = window.write(segment.begin + skipped, length - skipped, out, written)
            at += taken
            if written == out.shape[1]:
                return
        assert assigned.tail is not None, "a stream was exhausted before its next assignment"

    def _check(self, number: int, assigned: Assignment, segment: Segment, window: Packed) -> None:
        held = window.amount
        if held < segment.end or (assigned.tail is None and held != segment.end):
            source = self._sources[number]
            raise ValueError(
                f"{source.name}: the splits {source.splits_of(segment.window)} make {held} and made {segment.end} "
                f"{'tokens' if self._terms[number].overlap else 'rows'} when they were read first: the data changed"
            )


def _segments(assigned: Assignment, stream: int) -> Iterator[tuple[Segment, int]]:
    """The counted segments of a stream, each with its place in the stream's stream."""
    begin = int(assigned.begins[stream])
    for segment in assigned.queues[stream]:
        if segment.end == UNCOUNTED:
            return
        yield segment, begin
        begin += segment.end - segment.begin


def _end(assigned: Assignment, stream: int, depth: int) -> float:
    """Where a segment ends in its stream's stream; infinite when it is not counted."""
    queue = assigned.queues[stream][: depth + 1]
    if queue[-1].end == UNCOUNTED:
        return float("inf")
    return int(assigned.begins[stream]) + sum(segment.end - segment.begin for segment in queue)
