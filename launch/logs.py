"""`stoker logs`: the output of ranks, of one attempt or, with --follow, of consecutive attempts."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from stoker.conf.printable import printable
from stoker.conf.rundir import RunDirectory
from stoker.conf.values import ConfigError
from stoker.launch.control import living
from stoker.launch.inspect import run_at
from stoker.trainer.runtime.outcome import read_ending

_BLOCK = 1 << 16  # bytes read at a time
_POLL_SECONDS = 0.2
_QUIET_SECONDS = 3.0  # after an end, for an attempt that follows


def show(path: str, ranks: list[int] | None, attempt: int | None, lines: int, follow: bool) -> int:
    """Print the last `lines` (0: all) of each rank, each line with its rank where there are several."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the command silently
    run = run_at(path)
    numbers = run.attempt_numbers()
    if not numbers:
        raise ConfigError(f"{run.path} has not been started yet")
    number = attempt if attempt is not None else numbers[-1]
    if number not in numbers:
        raise ConfigError(f"{run.path} has no attempt {number}; there are {numbers[0]} to {numbers[-1]}")
    logs = _logs(run, number, ranks)
    if not logs and not follow:
        which = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
        raise ConfigError(f"attempt {number} of {run.path} has no log{which}")
    places = {rank: _tail(log, rank, lines, len(logs) > 1) for rank, log in logs.items()}
    if follow:
        with suppress(KeyboardInterrupt):  # the way to end it
            _follow(run, number, ranks, places, to_the_next=attempt is None)
    return 0


def _logs(run: RunDirectory, number: int, ranks: list[int] | None) -> dict[int, Path]:
    found = {int(log.stem.removeprefix("rank-")): log for log in run.attempt(number).glob("rank-*.log")}
    return {rank: log for rank, log in sorted(found.items()) if not ranks or rank in ranks}


def _tail(log: Path, rank: int, lines: int, named: bool) -> int:
    """Prints; returns the end of the file at that time."""
    with log.open("rb") as file:
        file.seek(_begin_of_last(file, lines) if lines else 0)
        return _copy(file, rank, named)


def _begin_of_last(file: IO[bytes], lines: int) -> int:
    """Where the last `lines` of a file begin; what follows its last line end is no line yet."""
    begin, wanted = file.seek(0, os.SEEK_END), lines + 1  # line ends: that of the line before them is one of these
    while begin:
        size = min(_BLOCK, begin)
        begin -= size
        file.seek(begin)
        block = file.read(size)
        count = block.count(b"\n")
        if count >= wanted:
            at = size
            for _ in range(wanted):
                at = block.rindex(b"\n", 0, at)
            return begin + at + 1
        wanted -= count
    return 0


def _copy(file: IO[bytes], rank: int, named: bool) -> int:
    """Print the whole lines of `file` from where it is, and where it then is. A line that is being written is left.

    A very long line is shown in parts.
    """
    end = file.tell()
    while line := file.readline(_BLOCK):
        if not line.endswith(b"\n") and len(line) < _BLOCK:
            break
        end += len(line)
        _print(line, rank, named)
    sys.stdout.flush()
    return end


def _follow(run: RunDirectory, number: int, ranks: list[int] | None, places: dict[int, int], to_the_next: bool) -> None:
    """Until the attempt, or with `to_the_next` the run, has ended."""
    quiet_since: float | None = None
    while True:
        logs = _logs(run, number, ranks)
        for rank, log in logs.items():
            with log.open("rb") as file:
                file.seek(places.get(rank, 0))
                places[rank] = _copy(file, rank, len(logs) > 1)
        later = run.attempt_numbers()[-1] > number
        if later and to_the_next:
            number, places, quiet_since = number + 1, {}, None
            print(f"--- attempt {number} ---", flush=True)
            continue
        if later or read_ending(run, number) is not None or living(run) is None:
            quiet_since = quiet_since or time.monotonic()
            if time.monotonic() - quiet_since > (_QUIET_SECONDS if to_the_next else 2 * _POLL_SECONDS):
                return
        else:
            quiet_since = None
        time.sleep(_POLL_SECONDS)


def _print(line: bytes, rank: int, named: bool) -> None:
    text = printable(line.decode("utf-8", errors="replace"))
    sys.stdout.write((f"[{rank}] " if named else "") + text + ("" if text.endswith("\n") else "\n"))
