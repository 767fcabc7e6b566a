"""Starts of one run: each makes an attempt, and the newest owns the run.

Two launchers may start a run at the same time, and an old one may continue after a new one has begun: a process that
was suspended, or a machine that was cut off. So a start changes the files that all of them share (the metrics, the
marks of places, the fence of the checkpoints, requests, the config) only as the newest one, and no attempt begins
meanwhile.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from stoker.conf.durable import TEMPORARY, open_own
from stoker.conf.rundir import RunDirectory, next_attempt
from stoker.trainer.runtime.outcome import close_dead_attempts
from stoker.trainer.runtime.process import read_stamps

log = logging.getLogger(__name__)

LOCK_SECONDS = 10.0  # that another start may keep the lock: the blocks under it take milliseconds
_POLL_SECONDS = 0.01
_SWEPT = 8  # newest attempts in which each start looks for what was left
_MOST_BYTES = 256  # of the id of a launch


@dataclass(frozen=True)
class Start:
    """One start of a run's ranks."""

    run: RunDirectory
    attempt: int

    def is_newest(self) -> bool:
        """Whether no other start of the run has begun since."""
        return not self.run.attempt(self.attempt + 1).exists()  # numbers follow each other: see `next_attempt`

    @contextmanager
    def exclusively(self) -> Iterator[bool]:
        """Yields whether this start is the newest; no other one begins before the block ends."""
        with _locked(self.run):
            yield self.is_newest()


def begin_attempt(run: RunDirectory, launch: str) -> int:
    """Make a new attempt, of the launch with this id, and return its number. Attempts without an outcome get one."""
    run.attempts.mkdir(parents=True, exist_ok=True)
    with _locked(run):
        number = next_attempt(run)
        with open(open_own(run.launch(number), os.O_WRONLY | os.O_CREAT), "wb") as file:
            file.write(launch.encode())
    close_dead_attempts(run, number)
    for earlier in range(max(1, number - _SWEPT), number):
        _sweep(run, earlier)
    return number


def attempt_of(run: RunDirectory, launch: str, before: int) -> int | None:
    """The first attempt of a launch after the first `before` attempts of the run; None while there is none."""
    return next((number for number in run.attempt_numbers()[before:] if _launch_of(run, number) == launch), None)


def is_superseded(run: RunDirectory, launch: str, before: int) -> bool:
    """Whether another attempt has followed this one, or only another launch has made one: then that owns the run."""
    numbers = run.attempt_numbers()[before:]
    return bool(numbers) and numbers[-1] != attempt_of(run, launch, before)


def _sweep(run: RunDirectory, number: int) -> None:
    """Remove files that rank 0 of an attempt was writing when it was killed. A process that lives may need them."""
    with suppress(OSError, ValueError):  # somebody else removes them too, or a stamp is damaged
        stamp = read_stamps(run.attempt(number)).get(0)
        if stamp is None or (stamp.host == socket.gethostname() and not Path(f"/proc/{stamp.pid}").exists()):
            for left in run.attempt(number).glob(f"*{TEMPORARY}"):
                left.unlink()


def _launch_of(run: RunDirectory, number: int) -> str | None:
    with suppress(OSError), open(run.launch(number), "rb") as file:
        return file.read(_MOST_BYTES).decode(errors="replace")
    return None


@contextmanager
def _locked(run: RunDirectory) -> Iterator[None]:
    """A lock of the file system on the folder of attempts.

    Where the file system has no locks, or a suspended process keeps it, the block runs without: the checks inside it
    then leave a gap of milliseconds.
    """
    folder = os.open(run.attempts, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(folder, run)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, run: RunDirectory) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return log.warning("%s: another start has kept its lock for %.0f s", run.attempts, LOCK_SECONDS)
        except OSError as error:
            return log.info("%s: the file system has no locks: %s", run.attempts, error)
        time.sleep(_POLL_SECONDS)
