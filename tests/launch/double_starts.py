"""One run directory started by two launchers at nearly the same time: shared by the suite and benchmarks/chaos.py."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stoker.checkpoint import newest
from stoker.checkpoint.audit import verify
from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.outcome import Outcome, read_ending
from tests.launch.runs import command, overrides, started, steps_of, train_here, wait_until_gone, write_text

ROOT = Path(__file__).parents[2]
STEPS = 8  # of each double start; with the slow model they take longer than the second launcher is late
SUPERSEDED = "another start of this run has begun"
NOTHING = "nothing to do"


def started_twice(home: Path, offsets: Sequence[float]) -> dict[str, int]:
    """Start one run with two launchers for each of these offsets, in seconds; how often what happened.

    Raises AssertionError unless exactly one of the two trained, the other ended with one line, and at the end the run
    is bitwise one that was started once.
    """
    run = RunDirectory(home / "twice")
    write_text(home / "text")
    found = {"the first trained on": 0, "the second trained on": 0, "the first had finished": 0}
    for number, offset in enumerate(offsets, start=1):
        words = _words(run.path, home, STEPS * number)
        with started(home, words, cwd=ROOT) as first:
            with suppress(subprocess.TimeoutExpired):
                first.wait(offset)
            with started(home, words, cwd=ROOT) as second:
                outputs = [process.communicate(timeout=600)[0] for process in (first, second)]
        wait_until_gone(home)
        statuses = [first.returncode, second.returncode]
        where = f"offset {offset:.3f}: statuses {statuses}\n" + "\n---\n".join(outputs)
        if statuses == [0, 0]:
            assert NOTHING in outputs[1], where
            found["the first had finished"] += 1
            continue
        assert sorted(statuses) == [0, 1], where
        lost = statuses.index(1)
        found["the second trained on" if lost == 0 else "the first trained on"] += 1
        lines = [line for line in outputs[lost].splitlines() if SUPERSEDED in line]
        assert len(lines) == 1 and "Traceback" not in outputs[lost], where
        ending = read_ending(run, run.attempt_numbers()[-1])
        assert ending is not None and ending.outcome is Outcome.COMPLETED, where
    reference = home / "once"
    train_here(home, overrides(reference, home / "text", *_common(STEPS * len(offsets)), "launch.nproc=2"))
    assert steps_of(run.path) == steps_of(reference)
    for checkpoint in newest(run.checkpoints):
        assert not verify(checkpoint, lambda *_: None)
    assert not list(run.checkpoints.glob("*.partial"))
    return found


def _common(steps: int) -> list[str]:
    return [f"steps={steps}", "schedule.total_steps=100", "checkpoint.every=2", "log.every=1000"]


def _words(run: Path, home: Path, steps: int) -> list[str]:
    slow = "model.target=tests.launch.slow:build"
    return command("train", *overrides(run, home / "text", *_common(steps), slow, "launch.nproc=2"))
