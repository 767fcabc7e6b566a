"""Goodput: how every second of a run, over all its attempts, was spent.

Rank 0 of each attempt keeps a small file (`Booking`). Time booked after the checkpoint from which the next attempt
resumed counts as lost; between attempts the run was down. `goodput` needs only these files, also for a run that is in
progress or was killed.
"""

from __future__ import annotations

import json
import logging
import os
import time
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
MARKS = 50  # newest saves whose seconds are kept


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

    def after(self, step: int) -> float:
        """Seconds of steps after `step`, which a run that goes back to it has lost."""
        before: dict[str, float] = {}
        for marked, seconds in self.marks:
            if marked <= step:
                before = seconds
        return sum(self.seconds.get(name, 0.0) - before.get(name, 0.0) for name in _OF_STEPS)


@dataclass
class _StoredRecord:
    """`_Record` as JSON has it."""

    began: float
    time: float
    resumed_from: int | None
    seconds: dict[str, Any]
    marks: list[Any] = field(default_factory=list)


class Booking:
    """Rank 0's file of seconds. Written now and then: a kill costs half a second of exactness."""

    def __init__(self, path: Path, phase: Phases, resumed_from: int) -> None:
        now = time.time()
        self._path, self._phase = path, phase
        self._record = _Record(process_start(now), now, resumed_from, {})
        self._lost: dict[str, float] = {}  # taken from other books by rollbacks
        self._written = 0.0
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
        self.write()

    def write(self) -> None:
        self._update()
        self._written = time.monotonic()
        try:
            write_whole(self._path, json.dumps(vars(self._record)).encode())
        except OSError as error:
            if not is_full(error):
                raise
            log.info("seconds will be written later: %s", reason(error))

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


def goodput(run: RunDirectory, now: float | None = None) -> Goodput:
    """All seconds of a run by book. `now`: for a run in progress; without it, the last record is the end."""
    numbers = run.attempt_numbers()
    records = {number: _read(run, number) for number in numbers}
    found = dict.fromkeys(BOOKS, 0.0)
    end: float | None = None  # of what is booked so far
    for place, number in enumerate(numbers):
        record = records[number]
        if end is not None:
            found["down"] += max(0.0, record.began - end)
        following = records[numbers[place + 1]] if place + 1 < len(numbers) else None
        back = [step for later in numbers[place + 1 :] if (step := records[later].resumed_from) is not None]
        lost = record.after(min(back)) if back else 0.0
        share = lost / whole if (whole := sum(record.seconds.get(name, 0.0) for name in _OF_STEPS)) else 0.0
        for name, seconds in record.seconds.items():
            kept = seconds * (1 - share) if name in _OF_STEPS else seconds
            found[name] += kept
        found["lost"] += lost
        ended, alive = _end_of(run, number, record, now if following is None else None)
        if following is not None:
            ended = min(ended, max(following.began, record.time))
        if alive:
            book = "startup" if record.resumed_from is None else "training"
        else:
            book = "lost" if following is not None else "down"
        found[book] += ended - record.time
        end = ended
    return Goodput(found, len(numbers))


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
    try:
        marks = [(int(step), _seconds(seconds)) for step, seconds in record.marks]
    except TypeError as error:
        raise ValueError("its marks are no pairs of a step and seconds") from error
    return _Record(record.began, record.time, record.resumed_from, _seconds(record.seconds), marks)


def _seconds(values: Any) -> dict[str, float]:
    if not isinstance(values, dict) or any(type(value) not in (int, float) for value in values.values()):
        raise ValueError("seconds are numbers by book")
    return {name: float(values.get(name, 0.0)) for name in BOOKS if name in values}


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
