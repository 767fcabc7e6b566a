"""A run from the command line to its end."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.launch.cli import main
from stoker.trainer.report.metrics import read
from stoker.trainer.runtime.outcome import Outcome, read_ending
from tests.extent import some
from tests.launch.runs import (
    command,
    finish,
    last_step,
    overrides,
    started,
    steps_of,
    train_forked,
    train_here,
    wait_until,
    wait_until_gone,
)


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> Path:
    run = home / "undisturbed"
    status, output = finish(home, command("train", *overrides(run, home / "text")))
    assert status == 0, output
    return run


def test_a_run_leaves_everything_in_its_directory(undisturbed: Path) -> None:
    run = RunDirectory(undisturbed)
    steps = read(run.metrics)
    assert [step["step"] for step in steps] == list(range(1, 31))
    for key in ("loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds", "data_seconds"):
        assert all(key in step for step in steps), key
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert 1e8 < steps[-1]["memory_least_bytes"] <= steps[-1]["memory_peak_bytes"] < 1e10
    assert steps[-1]["tokens"] == 30 * 8 * 32
    ending = read_ending(run, 1)
    assert ending is not None and (ending.outcome, ending.step) == (Outcome.COMPLETED, 30)
    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == [f"step-{n:08}" for n in (20, 25, 30)]
    assert run.log(1, 0).read_text() and run.log(1, 1).exists()
    assert run.loss_plot.read_bytes().startswith(b"\x89PNG")
    assert run.config.exists()


@pytest.mark.long
@pytest.mark.parametrize(
    "layout",
    [
        ["launch.nproc=1", "batch.micro_size=8"],
        ["launch.nproc=4", "parallel.tp=2", "parallel.pp=2"],
        pytest.param(
            ["launch.nproc=4", "parallel.tp=2", "parallel.zero=3", "activation_checkpointing=selective"],
            marks=pytest.mark.full,
        ),
    ],
    ids=" ".join,
)
def test_another_layout_computes_the_same(home: Path, undisturbed: Path, layout: list[str]) -> None:
    run = home / "-".join(layout)
    train_here(home, overrides(run, home / "text", *layout))
    for one, two in zip(read(RunDirectory(run).metrics), read(RunDirectory(undisturbed).metrics), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
        assert one["tokens"] == two["tokens"]


@pytest.mark.long
def test_torchrun_runs_the_same_program_bitwise(home: Path, undisturbed: Path) -> None:
    run = home / "torchrun"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "stoker.trainer",
    ]
    status, output = finish(home, [*torchrun, *overrides(run, home / "text")])
    assert status == 0, output
    assert steps_of(run) == steps_of(undisturbed)
    ending = read_ending(RunDirectory(run), 1)
    assert ending is not None and ending.outcome is Outcome.COMPLETED


@pytest.mark.long
@pytest.mark.parametrize("number", some([signal.SIGTERM, signal.SIGINT], 2))
def test_a_signal_saves_and_ends_every_process_within_ten_seconds(
    home: Path, undisturbed: Path, number: signal.Signals
) -> None:
    run = home / number.name
    words = command("train", *overrides(run, home / "text", "steps=100000", "schedule.total_steps=30"))
    with started(home, words) as process:
        wait_until(lambda: last_step(run) >= 7, process)
        asked = time.monotonic()
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
        assert time.monotonic() - asked < 10.0
        assert process.returncode == (0 if number == signal.SIGINT else 128 + number), output
        wait_until_gone(home, asked + 10.0 - time.monotonic())
    ending = read_ending(RunDirectory(run), 1)
    outcome = Outcome.STOPPED if number == signal.SIGINT else Outcome.PREEMPTED
    assert ending is not None and ending.outcome is outcome and ending.signal is not None
    assert ending.step == last_step(run)
    assert (RunDirectory(run).checkpoints / f"step-{ending.step:08}" / "MANIFEST.json").exists()
    shorter = min(30, len(steps_of(run)))
    assert steps_of(run)[:shorter] == steps_of(undisturbed)[:shorter]


@pytest.mark.full
def test_a_stop_file_ends_the_run_after_a_save_and_it_resumes(home: Path, undisturbed: Path) -> None:
    run = home / "stopped"
    words = overrides(run, home / "text", "steps=100000", "schedule.total_steps=30", "checkpoint.every=0")
    with started(home, command("train", *words)) as process:
        wait_until(lambda: last_step(run) >= 5, process)
        RunDirectory(run).stop.touch()
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0, output
    stopped_at = last_step(run)
    status, output = finish(home, command("train", f"run.dir={run}", f"steps={stopped_at + 4}"))
    assert status == 0, output
    assert [step[0] for step in steps_of(run)] == list(range(1, stopped_at + 5))


@pytest.mark.long
def test_a_finished_run_continues_elsewhere_with_more_steps(home: Path, undisturbed: Path) -> None:
    """8 -> 12 steps on other layouts, against an undisturbed run of 30 whose schedule it shares."""
    run = home / "moved"
    train_here(home, overrides(run, home / "text", "steps=8", "schedule.total_steps=30"))
    for steps, layout in ((10, ["launch.nproc=1", "parallel.zero=0"]), (12, ["launch.nproc=4", "parallel.zero=3"])):
        status, output = train_forked(home, [f"run.dir={run}", f"steps={steps}", *layout])
        assert status == 0, output
    moved, expected = read(RunDirectory(run).metrics), read(RunDirectory(undisturbed).metrics)[:12]
    assert [step["step"] for step in moved] == list(range(1, 13))
    for here, there in zip(moved, expected, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
        assert (here["lr"], here["tokens"]) == (there["lr"], there["tokens"])


@pytest.mark.full
def test_a_resumed_run_keeps_its_number_of_ranks_by_default(home: Path) -> None:
    run = home / "three"
    three = ["launch.nproc=3", "batch.size=9", "batch.micro_size=3", "steps=2"]
    train_here(home, overrides(run, home / "text", *three))
    status, output = finish(home, command("train", f"run.dir={run}", "steps=3"))
    assert status == 0, output
    assert sorted(path.name for path in RunDirectory(run).attempt(2).glob("*.log")) == [
        f"rank-{n}.log" for n in range(3)
    ]


@pytest.mark.long
def test_ranks_that_end_without_a_record_are_a_failure_even_after_a_success(undisturbed: Path, home: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from stoker.conf.rundir import *;"
        "from stoker.launch.local import launch;"
        f"config = read_config(RunDirectory(Path({str(undisturbed)!r}))); config.launch.max_restarts = 1;"
        "sys.executable = '/bin/false'; sys.exit(launch(config, 2, print))"
    )
    status, output = finish(home, [sys.executable, "-c", script])
    assert status == 1 and "ended with status 1" in output and "giving up after 1 restarts" in output


@pytest.mark.long
def test_a_change_of_the_maths_is_shown_and_needs_consent(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = home / "changed"
    train_here(home, overrides(run, home / "text", "steps=2"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    assert main(["train", f"run.dir={run}", "steps=3", "optim.lr=1e-3"]) == 2
    assert "optim.lr: 0.01 -> 0.001" in capsys.readouterr().err
    assert main(["train", f"run.dir={run}", "steps=3", "run.seed=1"]) == 2
    assert "run.seed" in capsys.readouterr().err
    status, output = finish(home, command("train", f"run.dir={run}", "steps=3", "optim.lr=1e-3", "run.change=true"))
    assert status == 0 and "optim.lr: 0.01 -> 0.001" in output
    assert main(["train", f"run.dir={run}", "run.fresh=true"]) == 2


@pytest.mark.long
def test_a_run_that_is_not_finite_ends_and_is_not_retried(home: Path) -> None:
    run = home / "nonfinite"
    more = ["model.target=tests.launch.broken:build", "nonfinite.limit=3"]
    status, output = finish(home, command("train", *overrides(run, home / "text", *more)), cwd=Path.cwd())
    assert status == 1, output
    ending = read_ending(RunDirectory(run), 1)
    assert ending is not None and ending.outcome is Outcome.NONFINITE
    assert RunDirectory(run).attempt_numbers() == [1]
    assert "3 steps in a row" in output or "4 steps in a row" in output
    assert [step["skipped"] for step in read(RunDirectory(run).metrics)] == [True] * ending.step
    assert json.loads((RunDirectory(run).metrics).read_text().splitlines()[0])["loss"] is None
    [state] = RunDirectory(run).checkpoints.glob("*/state.json")
    json.loads(state.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
