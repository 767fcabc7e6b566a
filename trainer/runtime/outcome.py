"""How an attempt ended: one small file per attempt, because launchers lose exit codes."""

from __future__ import annotations

import enum
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stoker.conf.durable import ROOM_SECONDS, naming, open_own, with_room, write_durably
from stoker.conf.records import read_record
from stoker.conf.rundir import RunDirectory

log = logging.getLogger(__name__)

GOES_ON = 75  # exit status for a run that was preempted: the same command resumes it (EX_TEMPFAIL of sysexits.h)


class Outcome(enum.StrEnum):
    COMPLETED = "completed"  # all steps done and saved
    STOPPED = "stopped"  # by a user (Ctrl-C, STOP file): saved
    PREEMPTED = "preempted"  # the machine is reclaimed (SIGTERM, SIGUSR1, a deadline): saved, to be resumed
    FAILED = "failed"  # an error, or a process that was killed
    HUNG = "hung"  # no progress for too long, and ended by the watchdog (`stoker.trainer.runtime.watchdog`)
    NONFINITE = "nonfinite"  # too many steps in a row without a finite loss and gradient norm


class Superseded(Exception):
    """Another start of the run has begun: only it may save from now on, so this one ends."""


@dataclass(frozen=True)
class Beginning:
    """`start.json`: the start conditions of an attempt."""

    time: float  # seconds since the epoch
    from_step: int  # of the checkpoint it could resume from; 0: none
    ranks: int
    host: str  # of global rank 0
    job: str | None = None  # the scheduler's number for it
    launch: str | None = None  # which launch started it (`process.launch_id`)


@dataclass(frozen=True)
class Ending:
    """`outcome.json`."""

    outcome: Outcome
    message: str  # one line for people
    step: int | None = None  # the last step done, where known
    rank: int | None = None  # of the process that failed, where known
    retry: bool = False  # would a new attempt have a chance?
    signal: int | None = None  # the signal that requested the stop
    time: float = 0.0  # seconds since the epoch
    save: dict[str, float] | None = None  # metrics of the last save: no step's line comes after it


@dataclass(frozen=True)
class _StoredEnding:
    """`Ending` as JSON has it."""

    outcome: str
    message: str
    step: int | None = None
    rank: int | None = None
    retry: bool = False
    signal: int | None = None
    time: float = 0.0
    save: dict[str, Any] | None = None


def write_ending(
    run: RunDirectory,
    attempt: int,
    ending: Ending,
    room_seconds: float = ROOM_SECONDS,
    waiting: Callable[[str], None] = log.warning,
) -> bool:
    """Write the attempt's outcome unless it has one: the first writer wins. True if this one was kept.

    On a full disk it waits for room, after a line to `waiting`. Raises OSError, naming the file, if there is still none
    after that.
    """
    path = run.outcome(attempt)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    ending = Ending(**{**asdict(ending), "time": ending.time or time.time()})

    def write() -> bool:
        try:
            with naming(path), open(open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                file.write((json.dumps(asdict(ending)) + "\n").encode())
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    return with_room(write, room_seconds, waiting)


def read_ending(run: RunDirectory, attempt: int) -> Ending | None:
    """The outcome of an attempt, or None while there is none."""
    path: Path = run.outcome(attempt)
    try:
        stored = read_record(path, _StoredEnding, "an outcome")
    except FileNotFoundError:
        return None
    try:
        return Ending(**{**vars(stored), "outcome": Outcome(stored.outcome)})
    except ValueError as error:
        raise ValueError(f"{path} is not an outcome: {error}") from error


def write_beginning(run: RunDirectory, attempt: int, beginning: Beginning) -> None:
    write_durably(run.beginning(attempt), (json.dumps(asdict(beginning)) + "\n").encode())


def read_beginning(run: RunDirectory, attempt: int) -> Beginning | None:
    """The start record of an attempt, or None where it did not get so far."""
    try:
        return read_record(run.beginning(attempt), Beginning, "a start record")
    except FileNotFoundError:
        return None


def is_first_of_launch(run: RunDirectory, attempt: int, launch: str) -> bool:
    """Whether no attempt of this launch has begun before `attempt`: one that died while it imported has not."""
    for number in reversed(run.attempt_numbers()):
        if number < attempt:
            with suppress(ValueError):  # damaged: the one before it decides
                beginning = read_beginning(run, number)
                if beginning is not None:
                    return beginning.launch != launch
    return True


def close_dead_attempts(run: RunDirectory, current: int) -> None:
    """Fill in the outcome of earlier attempts whose processes could not write one."""
    for attempt in run.attempt_numbers():
        if attempt < current and not run.outcome(attempt).exists():
            message = "left no exit record: the process was killed or the node was lost"
            write_ending(run, attempt, Ending(Outcome.FAILED, message, retry=True))
