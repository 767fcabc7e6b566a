"""Requesting and removing checkpoints."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

from stoker.checkpoint import newest, newest_step, remove
from stoker.conf.durable import touch_own
from stoker.conf.printable import printable
from stoker.conf.records import read_json
from stoker.conf.rundir import RunDirectory
from stoker.conf.values import ConfigError
from stoker.launch.inspect import checkpoints_of, run_at
from stoker.trainer.runtime.outcome import read_ending
from stoker.trainer.runtime.process import Stamp, read_stamps

FRESH_SECONDS = 120.0  # a rank on another machine with a stamp this recent counts as running
_POLL_SECONDS = 0.1


def remove_checkpoints(path: str, steps: list[int]) -> int:
    """Remove the checkpoints of `steps`. Raises ConfigError, with none removed, if no valid one would be left."""
    run = run_at(path)
    chosen = {step: checkpoints_of(run, step)[0] for step in steps}
    left = [summary for summary in checkpoints_of(run) if summary.step not in chosen and summary.problem is None]
    if not left and any(summary.problem is None for summary in chosen.values()):
        raise ConfigError(f"{run.path}: no valid checkpoint would be left; nothing was removed")
    for step, summary in chosen.items():
        remove(summary.path)
        print(f"removed step {step}")
    return 0


def save_now(path: str, wait_seconds: float) -> int:
    """Request a checkpoint of the run and wait for it; status 1 if no rank runs, or it fails or is late."""
    run = run_at(path)
    at = living(run)
    if at is None:
        print(f"no rank is training {run.path}: there is nothing to save", file=sys.stderr)
        return 1
    before = {checkpoint.name for checkpoint in newest(run.checkpoints)}
    asked = time.time()
    touch_own(run.save)
    print(f"requested: the run is at step {at.step}", flush=True)
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        begun = not run.save.exists()
        fresh = [checkpoint for checkpoint in newest(run.checkpoints) if checkpoint.name not in before]
        if begun and fresh:
            print(f"saved {fresh[0]}")
            return 0
        failure = _failure(run.checkpoints, asked) if begun else None
        if failure is not None:
            print(printable(f"the save failed: {failure}"), file=sys.stderr)
            return 1
        if living(run) is None:
            run.save.unlink(missing_ok=True)
            step = newest_step(run.checkpoints)
            print(f"the run has ended; its newest checkpoint is that of step {step}", file=sys.stderr)
            return 1
        time.sleep(_POLL_SECONDS)
    begun = not run.save.exists()
    run.save.unlink(missing_ok=True)
    state = "has begun to save, and continues" if begun else "has not reached the end of a step"
    print(f"not saved within {wait_seconds:.0f} s: the run {state}", file=sys.stderr)
    return 1


def living(run: RunDirectory) -> Stamp | None:
    """The newest stamp of a rank of a running attempt; None if no rank is training."""
    numbers = run.attempt_numbers()
    if not numbers or read_ending(run, numbers[-1]) is not None:
        return None
    stamps = [stamp for stamp in read_stamps(run.attempt(numbers[-1])).values() if _is_alive(stamp)]
    return max(stamps, key=lambda stamp: stamp.time, default=None)


def _is_alive(stamp: Stamp) -> bool:
    if stamp.host == socket.gethostname():
        return Path(f"/proc/{stamp.pid}").exists()
    return abs(time.time() - stamp.time) < FRESH_SECONDS  # a stamp of the future is no sign of life either


def _failure(directory: Path, since: float) -> str | None:
    """Why a save that was begun after the time `since` has failed."""
    for note in directory.glob("*.failed.json"):
        try:
            if note.stat().st_mtime >= since:
                return str(read_json(note)["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # cleared by a commit, or not written yet
    return None
