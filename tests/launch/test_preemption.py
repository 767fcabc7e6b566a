"""Requests to end at difficult moments."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.launch import local
from stoker.trainer.runtime.outcome import Ending, Outcome, read_ending, write_ending
from stoker.trainer.runtime.process import Phase, Stamp, read_stamps
from stoker.trainer.runtime.starts import begin_attempt
from tests.extent import some
from tests.launch.runs import (
    command,
    finish,
    kill,
    last_step,
    overrides,
    rank_pids,
    started,
    steps_of,
    train_here,
    wait_until,
    wait_until_gone,
)

SLOW = ["model.target=tests.launch.slow:build", "steps=100000", "schedule.total_steps=30"]


def stamps_of(run: RunDirectory) -> list[Stamp]:
    return list(read_stamps(run.attempt(1)).values())


@pytest.mark.long
def test_a_request_to_one_rank_during_an_evaluation_ends_it_on_all(home: Path) -> None:
    """The evaluation would take 40 s."""
    run = RunDirectory(home / "evaluating")
    words = overrides(run.path, home / "text", *SLOW, "eval.every=3", "eval.sequences=400", "batch.micro_size=1")
    with started(home, command("train", *words, "data.validation=0.5"), cwd=Path.cwd()) as process:
        wait_until(lambda: any(stamp.phase is Phase.EVALUATE for stamp in stamps_of(run)), process)
        asked = time.monotonic()
        kill(rank_pids(run.path)[1], signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert time.monotonic() - asked < 10
    assert process.returncode == 75, output
    ending = read_ending(run, 1)
    assert ending is not None and (ending.outcome, ending.step) == (Outcome.PREEMPTED, 3), ending
    assert last_step(run.path) == 3 and (run.checkpoints / "step-00000003" / "MANIFEST.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("number", some([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], 3))
def test_ranks_signalled_before_the_first_step_leave_at_once_even_from_c(home: Path, number: signal.Signals) -> None:
    run = RunDirectory(home / f"starting-{number.name}")
    words = overrides(run.path, home / "text", "model.target=tests.launch.stuck:build")
    with started(home, command("train", *words), cwd=Path.cwd()) as process:
        wait_until(lambda: [stamp.phase for stamp in stamps_of(run)] == [Phase.BUILD, Phase.BUILD], process)
        asked = time.monotonic()
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
        assert time.monotonic() - asked < 5
        wait_until_gone(home)
    assert process.returncode == (0 if number == signal.SIGINT else 128 + number), output
    ending = read_ending(run, 1)
    outcome = Outcome.STOPPED if number == signal.SIGINT else Outcome.PREEMPTED
    assert ending is not None and ending.outcome is outcome and "before the first step" in ending.message
    assert not list(run.checkpoints.glob("step-*"))


def test_a_port_that_is_taken_is_one_line(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [command()[0], "-P", "-m", "stoker.trainer", *overrides(home / "taken", home / "text")]
        status, output = finish(home, ["env", *(f"{key}={value}" for key, value in place.items()), *words])
    assert status == 2 and f"another program listens on 127.0.0.1:{port}" in output
    assert len(output.splitlines()) == 1, output


@pytest.fixture(scope="module")
def reference(home: Path) -> list[tuple[Any, ...]]:
    run = home / "reference"
    train_here(home, overrides(run, home / "text", "steps=60"))
    return steps_of(run)


@pytest.mark.long
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_run_that_is_started_twice_continues_once(
    home: Path, reference: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """`killed`: a rank of the first start is, before the ranks see that there is a second."""
    run = RunDirectory(home / f"twice-{killed}")
    words = overrides(
        run.path, home / "text", "model.target=tests.launch.slow:build", "steps=60", "launch.max_restarts=5"
    )
    with started(home, command("train", *words), cwd=Path.cwd()) as first:
        wait_until(lambda: last_step(run.path) >= 6, first)
        ranks = rank_pids(run.path)
        monkeypatch.setenv("STOKER_TEST_SLOW", "0")
        with started(home / "again", command("train", *words), cwd=Path.cwd()) as second:
            wait_until(lambda: len(run.attempt_numbers()) == 2, second)
            if killed:
                kill(ranks[1])
            told, _ = first.communicate(timeout=30)
            output, _ = second.communicate(timeout=60)
    last = "not restarting: another start" if killed else "another start"
    assert first.returncode == 1 and told.splitlines()[-1].startswith(f"stoker: {last} of this run has begun"), told
    assert second.returncode == 0, output
    assert run.attempt_numbers() == [1, 2]
    ending = read_ending(run, 2)
    assert ending is not None and ending.outcome is Outcome.COMPLETED
    assert steps_of(run.path) == reference


def test_a_launcher_reads_and_writes_the_outcome_of_its_own_attempt_only(tmp_path: Path) -> None:
    agent = object.__new__(local._Agent)
    agent._run, agent._launch = RunDirectory(tmp_path), "ours"
    run = agent._run
    begin_attempt(run, "ours")
    agent._attempts_before = 1
    assert agent._attempt() is None
    begin_attempt(run, "theirs")
    assert agent._attempt() is None, "two launchers started at the same time, and the other's ranks came first"
    assert begin_attempt(run, "ours") == agent._attempt() == 3
    begin_attempt(run, "theirs")
    write_ending(run, 4, Ending(Outcome.COMPLETED, "of the other"))
    ending = agent.ending()  # of the third attempt, which the fourth found dead
    assert agent._attempt() == 3 and ending is not None and ending.outcome is Outcome.FAILED
