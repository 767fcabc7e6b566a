"""Machines that come and go under torchrun, and how often ranks are started again."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import pytest

from stoker.conf.compose import compose
from stoker.conf.rundir import RunDirectory
from stoker.parallel.layout import fit
from stoker.trainer.runtime.outcome import Outcome, read_beginning, read_ending
from tests.launch.runs import command, kill, last_step, overrides, rank_pids, started, steps_of, train_here, wait_until


@pytest.mark.parametrize(
    ("words", "world", "replicas", "micro"),
    [
        (["parallel.dp_replicate=4", "batch.micro_size=2"], 16, 4, 2),
        (["parallel.dp_replicate=4", "batch.micro_size=2"], 8, 4, 2),
        (["parallel.dp_replicate=4", "batch.micro_size=4"], 2, 2, 4),
        (["parallel.dp_replicate=4", "batch.micro_size=4", "parallel.tp=2"], 8, 4, 4),
        (["parallel.dp_replicate=3", "batch.micro_size=4"], 32, 2, 1),
        (["parallel.dp_replicate=2", "parallel.zero=0"], 8, 8, None),
        (["parallel.dp_replicate=2"], 3, 2, None),  # 32 rows do not divide: left to be refused
    ],
)
def test_what_no_longer_divides_becomes_the_next_smaller_that_does(
    words: list[str], world: int, replicas: int | None, micro: int | None
) -> None:
    fitted = fit(compose([*words, "batch.size=32"]), world)
    assert (fitted.parallel.dp_replicate, fitted.batch.micro_size) == (replicas, micro)


@pytest.mark.long
def test_under_elastic_torchrun_machines_join_and_are_lost_and_the_run_continues(home: Path) -> None:
    """A machine has two ranks, which are one model (tp=2): one machine, two, one."""
    run, reference = home / "elastic", home / "reference"
    more = ["parallel.tp=2", "parallel.zero=1", "batch.micro_size=8", "schedule.total_steps=30", "checkpoint.every=4"]
    train_here(home, overrides(reference, home / "text", *more, "steps=100"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = overrides(run, home / "text", *more, "steps=100000", "model.target=tests.launch.slow:build")

    def torchrun(keeps_store: bool) -> list[str]:
        return [
            "env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",  # see docs/launch.md
            sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=2", "--max-restarts=5",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic", "--monitor-interval=0.1",
            f"--rdzv-conf=is_host={keeps_store},last_call_timeout=1", "-m", "stoker.trainer", *words,
        ]  # fmt: skip

    directory, other = RunDirectory(run), home / "other"

    def began(attempt: int) -> int | None:
        """On how many ranks."""
        beginning = read_beginning(directory, attempt)
        return beginning.ranks if beginning is not None else None

    with started(home, torchrun(True), cwd=Path.cwd()) as one:
        wait_until(lambda: last_step(run) >= 3, one)
        with started(other, torchrun(False), cwd=Path.cwd()) as two:
            wait_until(lambda: began(2), one)
            joined = last_step(run)
            wait_until(lambda: last_step(run) >= joined + 6, one)
            kill(two.pid)
            assert two.stdout is not None
            output = two.stdout.read()
        lost = last_step(run)
        wait_until(lambda: began(3) and last_step(run) >= lost + 3, one)
        directory.stop.touch()
        output += one.communicate(timeout=60)[0]
    endings = [read_ending(directory, attempt) for attempt in (1, 2, 3)]
    assert [ending and ending.outcome for ending in endings] == [Outcome.PREEMPTED, Outcome.FAILED, Outcome.STOPPED]
    assert endings[0] is not None and endings[0].step == joined, "a machine that joins loses no step"
    assert [began(attempt) for attempt in (1, 2, 3)] == [2, 4, 2]
    for line, times in (
        ("layout     tp 2,", 2),
        ("layout     dp_shard 2 x tp 2,", 1),
        ("batch.micro_size=8 becomes 4", 1),
    ):
        assert output.count(line) == times, output
    found, expected = steps_of(run), steps_of(reference)
    assert [step[0] for step in found] == list(range(1, len(found) + 1)) and len(found) >= 12
    for here, there in zip(found, expected, strict=False):
        assert here[2] == pytest.approx(there[2], rel=1e-5) and here[5] == there[5]


@pytest.mark.full
def test_the_restart_budget_counts_attempts_without_progress(home: Path) -> None:
    run = home / "budget"
    words = overrides(run, home / "text", "steps=24", "checkpoint.every=2", "launch.max_restarts=1")
    slow = "model.target=tests.launch.slow:build"
    with started(home, command("train", *words, slow), cwd=Path.cwd()) as process:
        for strike in (1, 2):
            step = last_step(run)
            wait_until(
                lambda strike=strike, step=step: (
                    len(RunDirectory(run).attempt_numbers()) == strike and last_step(run) >= step + 4
                ),
                process,
            )
            kill(rank_pids(run)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert output.count("restarting (1 of 1)") == 2
    assert len(steps_of(run)) == 24
