"""Real runs that meet bad steps: they go back and on without them, and a step can be looked at again."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.launch.cli import main
from stoker.trainer.report.goodput import goodput
from stoker.trainer.report.metrics import read
from stoker.trainer.runtime.outcome import Outcome, read_ending
from tests import world
from tests.extent import some
from tests.launch.runs import (
    assert_same_state,
    command,
    environment,
    finish,
    overrides,
    steps_of,
    train_forked,
    train_here,
)


def replay(run: str, step: int) -> tuple[int, str]:
    """On a rank, whose process it changes: `stoker replay` of `run`."""
    import torch.distributed as dist

    dist.destroy_process_group()  # a user's process has none
    os.chdir(Path(run).parent)
    os.environ |= environment(Path(run).parent)  # the run's start recorded there that its code is this user's
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        status = main(["replay", run, "--step", str(step)])
    return status, shown.getvalue()


def replayed(run: Path, step: int) -> tuple[int, str]:
    return world.run(replay, 1, str(run), step, fresh=True)[0]


WORDS = ["steps=18", "checkpoint.every=5", "launch.max_restarts=1"]


@pytest.mark.long
def test_a_rolled_back_run_is_the_run_that_never_took_the_bad_step(home: Path) -> None:
    reference, run = home / "without", home / "rolled-back"
    train_here(home, overrides(reference, home / "text", *WORDS, "skip_steps=[[12,12]]"))
    faults = "faults=[{at: 12, rank: 1, do: nan}, {at: 17, rank: 0, do: kill}]"  # after a save that has the span
    words = overrides(run, home / "text", *WORDS, "nonfinite.action=rollback", "checkpoint.mode=sync", faults)
    status, output = finish(home, command("train", *words))
    assert status == 0, output
    assert "step 12 is bad: back to step 10" in output
    assert steps_of(run) == steps_of(reference)
    assert_same_state(run, reference)
    assert [step["step"] for step in read(RunDirectory(run).metrics)] == [*range(1, 12), *range(13, 19)]
    spent = goodput(RunDirectory(run))
    assert spent.attempts == 2 and spent.seconds["lost"] > 0 and "goodput" in output


@pytest.mark.long
def test_rollbacks_have_a_budget_and_a_step_can_be_replayed(home: Path) -> None:
    run = home / "budget"
    faults = "faults=[{at: 7, rank: 1, do: nan}, {at: 9, rank: 0, do: nan}]"
    words = overrides(run, home / "text", *WORDS, "nonfinite.action=rollback", "nonfinite.limit=1", faults)
    status, _ = train_forked(home, words)
    assert status == 1
    ending = read_ending(RunDirectory(run), 1)
    assert ending is not None and ending.outcome is Outcome.NONFINITE and "1 rollbacks" in ending.message
    status, output = replayed(run, 8)
    assert status == 0 and "from the checkpoint of step 5: rows 56 to 63" in output
    assert "training first, from the checkpoint of step 5: steps 6 to 7\nstoker: step 6 of 7 is trained\n" in output
    assert "step 7 of 7" not in output, "it was passed over"
    loss = next(step["loss"] for step in read(RunDirectory(run).metrics) if step["step"] == 8)
    assert float(output.partition("loss ")[2].split()[0]) == pytest.approx(loss, rel=1e-5)
    assert f"(in the run: {loss})" in output and "every number is finite" in output


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "poisoned"),
    some(
        [
            ("parallel.pp=2", "layers.1.attention_norm"),
            ("parallel.zero=3", "embedding"),
            ("parallel.tp=2", "embedding"),
        ],
        3,
    ),
)
def test_a_replayed_bad_step_names_the_first_module(home: Path, layout: str, poisoned: str) -> None:
    run = home / layout
    shutil.copy(Path(__file__).with_name("fragile.py"), home)
    words = [layout, "model.num_key_value_heads=2", "steps=4", "model.target=fragile:build", "optim.lr=1e3"]
    words += ["schedule=constant", "schedule.warmup_steps=0", "faults=[{at: 1, rank: 1, do: nan}]"]
    status, output = train_forked(home, overrides(run, home / "text", *words))
    assert status == 0, output
    assert [step["skipped"] for step in read(RunDirectory(run).metrics)] == [True, False, True, True]
    for step, module in ((1, poisoned), (3, "layers.1")):  # injected; and of its own accord after one update
        status, output = replayed(run, step)
        assert status == 1, output
        assert f"first output that is not finite: {module} (micro-batch 1)" in output, output
        assert "gradients that are not finite" in output
