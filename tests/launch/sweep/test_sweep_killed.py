"""A sweep that is killed over and over ends with the results of runs that were never disturbed."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.outcome import Outcome, read_ending
from tests.extent import FULL, some
from tests.launch.runs import (
    assert_same_state,
    command,
    finish,
    kill,
    last_step,
    overrides,
    started,
    steps_of,
    train_here,
    wait_until,
    wait_until_gone,
    write_text,
)

KILLS = 20 if FULL else 3
SEEDS = some(("1", "2"), 2)
RATES = ["1e-2", "3e-3", "1e-3", "3e-4"]
TRIALS = len(RATES) * len(SEEDS)


@pytest.mark.long
@pytest.mark.full
@pytest.mark.timeout(1500)
def test_a_sweep_killed_many_times_ends_with_results_bit_equal_to_runs_alone(tmp_path: Path) -> None:
    text, swept, chance = write_text(tmp_path / "text"), tmp_path / "swept", random.Random(7)
    # Steps of a twentieth of a second, of which there have to be enough for all kills
    fixed = ["steps=20", "checkpoint.every=2", "launch.nproc=1", "parallel.zero=0", "log.every=20"]
    small = [word for word in overrides(swept, text, *fixed) if not word.startswith(("optim.lr", "run.seed"))]
    words = command("sweep", *small, f"optim.lr={','.join(RATES)}", f"run.seed={','.join(SEEDS)}")

    def trained() -> int:
        """Attempts and steps, of all trials."""
        runs = [RunDirectory(swept / str(number)) for number in range(TRIALS)]
        return sum(len(run.attempt_numbers()) + last_step(run.path) for run in runs)

    for _ in range(KILLS):
        wanted = trained() + chance.choice([1, 2, 3, 4, 8])  # in the start, the steps, the saves, or the next trial
        with started(tmp_path, words) as process:
            wait_until(lambda wanted=wanted: trained() >= wanted, process, seconds=200)
            time.sleep(chance.random() * 0.2)
            kill(process.pid)
            process.wait()
            wait_until_gone(tmp_path)
    status, output = finish(tmp_path, words, timeout=600)
    assert status == 0, output
    for number, (rate, seed) in enumerate(itertools.product(RATES, SEEDS)):
        run, alone = RunDirectory(swept / str(number)), tmp_path / f"alone-{number}"
        endings = [read_ending(run, attempt) for attempt in run.attempt_numbers()]
        assert [e.outcome for e in endings if e is not None].count(Outcome.COMPLETED) == 1, "none is done twice"
        own = [f"optim.lr={rate}", f"run.seed={seed}", f"run.dir={alone}"]
        train_here(tmp_path, [*[word for word in small if not word.startswith("run.dir")], *own])
        assert steps_of(run.path) == steps_of(alone)
        assert_same_state(run.path, alone)
