"""Goodput: how every second of a run, over all its attempts, was spent.

Rank 0 of each attempt keeps a small file (`Booking`). Time booked after the checkpoint from which the next attempt
resumed counts as lost; between attempts the run was down. `goodput` needs only these files, also for a run that is in
progress or was killed.

The file has the sums at up to `MOMENTS` times of the attempt, so that what lies between two of them is known with its
time (`Account.spans`). When there are more, every second one is dropped: an attempt of any length is covered whole.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker.conf.durable import is_full, write_whole
from stoker.conf.reasons import reason
from stoker.conf.records import read_json, record_of
from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.outcome import read_ending
from stoker.trainer.runtime.process import Phase, Phases, read_stamps

log = logging.getLogger(__name__)

BOOKS = ("training", "data", "checkpoint", "evaluation", "startup", "lost", "down")
BOOK_OF = {
    Phase.START: "startup",
    Phase.OPEN_DATA: "startup",
    Phase.BUILD: "startup",
    Phase.RESUME: "startup",
    Phase.DATA: "data",
    Phase.FORWARD_BACKWARD: "training",
    Phase.AWAIT_STAGED: "checkpoint",
    Phase.UPDATE: "training",
    Phase.EVALUATE: "evaluation",
    Phase.SAVE: "checkpoint",
    Phase.ROLLBACK: "lost",
    Phase.LAST_SAVE: "checkpoint",
    Phase.UPLOAD: "checkpoint",
}
_OF_STEPS = ("training", "data", "checkpoint", "evaluation")  # done again when a run goes back
WRITE_SECONDS = 0.5
_MOST_SECONDS = 1e12  # of a clock or a book; sums of more are not finite
MARKS = 50  # newest saves whose seconds are kept
MOMENTS = 128  # times at which the seconds so far are kept


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by book; together they are all seconds from its first start to its end, or to now."""

    seconds: dict[str, float]
    attempts: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Of all seconds, those that trained and were not lost."""
        return self.seconds["training"] / self.total if self.total else 0.0

    def __str__(self) -> str:
        rest = [f"{name} {self.seconds[name] / self.total:.1%}" for name in BOOKS[1:] if self.total]
        return f"{self.share:.1%} training" + "".join(f", {part}" for part in rest)


@dataclass
class _Record:
    """`seconds.json` of an attempt."""

    began: float  # seconds since the epoch: when rank 0's process did
    time: float  # until when all is booked
    resumed_from: int | None  # step; 0: from initial weights; None: it did not get so far
    seconds: dict[str, float]
    marks: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # what was booked when a step was saved
    moments: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # what was booked at a time

    def until(self, step: int) -> dict[str, float]:
        """What was booked when the state after `step` was saved; a run that goes back to it loses what came later."""
        before: dict[str, float] = {}
        for marked, seconds in self.marks:
            if marked <= step:
                before = seconds
        return before


def _lost_after(seconds: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """`seconds` with those of steps beyond `before` booked as lost."""
    found = dict(seconds)
    for name in _OF_STEPS:
        gone = max(0.0, found.get(name, 0.0) - before.get(name, 0.0))
        if gone:
            found[name] -= gone
            found["lost"] = found.get("lost", 0.0) + gone
    return found


@dataclass
class _StoredRecord:
    """`_Record` as JSON has it."""

    began: float
    time: float
    resumed_from: int | None
    seconds: dict[str, Any]
    marks: list[Any] = field(default_factory=list)
    moments: list[Any] = field(default_factory=list)


class Booking:
    """Rank 0's file of seconds. Written now and then: a kill costs half a second of exactness."""

    def __init__(self, path: Path, phase: Phases, resumed_from: int) -> None:
        now = time.time()
        self._path, self._phase = path, phase
        self._record = _Record(process_start(now), now, resumed_from, {})
        self._lost: dict[str, float] = {}  # taken from other books by rollbacks
        self._written = 0.0
        self._between = WRITE_SECONDS / 2  # seconds between two moments, at least
        self._moments_as_json: list[str] = []  # they are many, and seldom change
        self.write()

    def step(self) -> None:
        """A step was handed to the device."""
        if time.monotonic() - self._written >= WRITE_SECONDS:
            self.write()

    def saving(self, step: int) -> None:
        """The state after `step` begins to be saved."""
        self._update()
        self._record.marks = [*self._record.marks, (step, dict(self._record.seconds))][-MARKS:]
        self.write()

    def rolled_back(self, step: int) -> None:
        """The run has gone back to `step` within the attempt."""
        self._update()
        marks = [mark for mark in self._record.marks if mark[0] <= step]
        before = marks[-1][1] if marks else {}
        for name in _OF_STEPS:
            gone = self._record.seconds.get(name, 0.0) - before.get(name, 0.0)
            self._lost[name] = self._lost.get(name, 0.0) + gone
        self._record.marks = marks
        self._record.moments = [(at, _lost_after(seconds, before)) for at, seconds in self._record.moments]
        self._moments_as_json = list(map(json.dumps, self._record.moments))
        self.write()

    def write(self) -> None:
        self._update()
        self._keep_moment()
        self._written = time.monotonic()
        rest = {name: value for name, value in vars(self._record).items() if name != "moments"}
        text = f'{json.dumps(rest)[:-1]}, "moments": [{", ".join(self._moments_as_json)}]}}'
        try:
            write_whole(self._path, text.encode())
        except OSError as error:
            if not is_full(error):
                raise
            log.info("seconds will be written later: %s", reason(error))

    def _keep_moment(self) -> None:
        moments, now = self._record.moments, self._record.time
        if moments and now - moments[-1][0] < self._between:
            return
        if len(moments) >= MOMENTS:
            del moments[1:-1:2], self._moments_as_json[1:-1:2]
            self._between *= 2
        moments.append((round(now, 3), {name: round(own, 3) for name, own in self._record.seconds.items() if own}))
        self._moments_as_json.append(json.dumps(moments[-1]))

    def _update(self) -> None:
        spent = self._phase.totals()
        self._record.time = time.time()
        seconds = dict.fromkeys(BOOKS[:-1], 0.0)
        for phase, own in spent.items():
            seconds[BOOK_OF[phase]] += own
        for name, gone in self._lost.items():
            seconds[name] -= gone
            seconds["lost"] += gone
        # Time before the first phase (imports, the rendezvous) counts as startup.
        seconds["startup"] += max(0.0, self._record.time - self._record.began - sum(seconds.values()))
        self._record.seconds = seconds


def process_start(now: float) -> float:
    """When this process began, in seconds since the epoch; `now` where the system does not provide it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return now
    return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


@dataclass(frozen=True)
class Span:
    """A part of an attempt. Its `seconds` by book are as many as it lasts; their order within it is not known."""

    began: float  # seconds since the epoch
    seconds: dict[str, float]


@dataclass(frozen=True)
class Account:
    """The seconds of one attempt. Those of `seconds` are `ended` - `began`, each booked once."""

    number: int
    began: float  # seconds since the epoch
    ended: float  # or now, for the attempt that runs
    seconds: dict[str, float]  # by book
    down_before: float  # between the end of the attempt before and `began`
    resumed_from: int | None  # step; 0: from initial weights; None: it did not get so far
    spans: list[Span]  # one after the other; together they are `seconds`


def goodput(run: RunDirectory, now: float | None = None) -> Goodput:
    """All seconds of a run by book. `now`: for a run in progress; without it, the last record is the end."""
    found = dict.fromkeys(BOOKS, 0.0)
    attempts = accounts(run, now)
    for account in attempts:
        found["down"] += account.down_before
        for name, seconds in account.seconds.items():
            found[name] += seconds
    return Goodput(found, len(attempts))


def accounts(run: RunDirectory, now: float | None = None) -> list[Account]:
    """The seconds of each attempt, oldest first; `now` as for `goodput`."""
    numbers = run.attempt_numbers()
    records = {number: _read(run, number) for number in numbers}
    found: list[Account] = []
    for place, number in enumerate(numbers):
        record = records[number]
        following = records[numbers[place + 1]] if place + 1 < len(numbers) else None
        back = [step for later in numbers[place + 1 :] if (step := records[later].resumed_from) is not None]
        before = record.until(min(back)) if back else record.seconds
        booked = dict.fromkeys(BOOKS, 0.0) | _lost_after(record.seconds, before)
        moments = [(at, _lost_after(seconds, before)) for at, seconds in record.moments]
        ended, alive = _end_of(run, number, record, now if following is None else None)
        if following is not None:
            ended = min(ended, max(following.began, record.time))
        if alive:
            book = "startup" if record.resumed_from is None else "training"
        else:
            book = "lost" if following is not None else "down"
        seconds = booked | {book: booked[book] + ended - record.time}
        spans = _spans(record.began, [*moments, (record.time, booked), (ended, seconds)])
        down = max(0.0, record.began - found[-1].ended) if found else 0.0
        found.append(Account(number, record.began, ended, seconds, down, record.resumed_from, spans))
    return found


def _spans(began: float, moments: Iterable[tuple[float, Mapping[str, float]]]) -> list[Span]:
    """What was booked between `moments` of an attempt, of which the last has all; a book never loses seconds."""
    found: list[Span] = []
    at, before = began, dict.fromkeys(BOOKS, 0.0)
    for until, seconds in moments:
        more = {name: max(0.0, seconds.get(name, 0.0) - before[name]) for name in BOOKS}
        if sum(more.values()) > 0:
            found.append(Span(at, {name: own for name, own in more.items() if own > 0}))
            before = {name: before[name] + own for name, own in more.items()}
        at = max(at, until)
    return found


def _has_ended(run: RunDirectory, number: int) -> bool:
    """Whether an attempt has an outcome, sound or damaged."""
    try:
        return read_ending(run, number) is not None
    except ValueError:
        return True


def _stamped(run: RunDirectory, number: int) -> list[float]:
    """When the ranks of an attempt last stamped their progress; none where a stamp is damaged."""
    with suppress(ValueError):
        return [stamp.time for stamp in read_stamps(run.attempt(number)).values()]
    return []


def _record_of(values: Any) -> _Record:
    """Raises ValueError for what is no record."""
    record = record_of(values, _StoredRecord)
    if not (0 <= record.began < _MOST_SECONDS and 0 <= record.time < _MOST_SECONDS):
        raise ValueError("it begins or ends at no time")
    try:
        marks = [(int(step), _seconds(seconds)) for step, seconds in record.marks]
        moments = [(float(at), _seconds(seconds)) for at, seconds in record.moments]
    except TypeError as error:
        raise ValueError("its marks and moments are no pairs of a number and seconds") from error
    if any(not 0 <= at < _MOST_SECONDS for at, _ in moments):
        raise ValueError("it has a moment at no time")
    return _Record(record.began, record.time, record.resumed_from, _seconds(record.seconds), marks, moments)


def _seconds(values: Any) -> dict[str, float]:
    if not isinstance(values, dict) or not all(map(_is_seconds, values.values())):
        raise ValueError("seconds are numbers by book")
    return {name: float(values.get(name, 0.0)) for name in BOOKS if name in values}


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _MOST_SECONDS


def _end_of(run: RunDirectory, number: int, record: _Record, now: float | None) -> tuple[float, bool]:
    """Until when the attempt made progress, and whether it continues. A hang counts from its beginning."""
    if now is not None and not _has_ended(run, number):
        return max(now, record.time), True
    return max([record.time, *_stamped(run, number)]), False


def _read(run: RunDirectory, number: int) -> _Record:
    """The record of an attempt; a start until the last stamp for one that did not get so far or has no sound record."""
    try:
        return _record_of(read_json(run.seconds(number)))
    except (FileNotFoundError, ValueError):
        folder = run.attempt(number)
        began = min([folder.stat().st_mtime, *(entry.stat().st_mtime for entry in folder.iterdir())])
        stamps = _stamped(run, number)
        return _Record(began, max([began, *stamps]), None, {"startup": max([began, *stamps]) - began})
