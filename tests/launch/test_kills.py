"""kill -9 of any process at any moment: the run resumes without a difference."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.parallel.loopback import LOOPBACK
from stoker.trainer.runtime.outcome import Outcome, read_ending
from tests.launch.runs import (
    assert_same_state,
    command,
    finish,
    kill,
    last_step,
    listening_addresses,
    overrides,
    rank_pids,
    started,
    steps_of,
    train_here,
    wait_until,
    wait_until_gone,
)

STEPS = 60
LONG = [f"steps={STEPS}", "checkpoint.every=2", "launch.max_restarts=20", "tracker=none"]


def is_saving(run: Path) -> bool:
    return any(RunDirectory(run).checkpoints.glob("*.partial"))


class Killer:
    """Kills at moments that come from a seed, and always after some progress, so that the run ends."""

    def __init__(self, run: Path, seed: int, steps: int = STEPS) -> None:
        self.run, self.random, self.steps = run, random.Random(seed), steps
        self.kills: list[str] = []

    def strike(self, process: subprocess.Popen[str], victim: str) -> None:
        before = last_step(self.run)
        wait_until(lambda: last_step(self.run) >= min(before + self.random.randrange(1, 4), self.steps - 8), process)
        ranks = wait_until(lambda: len(found := rank_pids(self.run)) == 2 and found, process)
        if victim == "rank in mid-save":
            wait_until(lambda: is_saving(self.run), process)
        else:
            time.sleep(self.random.random() * 0.1)
        victims = {
            "launcher": [process.pid],
            "all ranks": list(ranks.values()),
        }.get(victim, [ranks[self.random.randrange(2)]])
        for pid in victims:
            kill(pid)
        self.kills.append(victim)
        if victim != "launcher":
            attempts = len(RunDirectory(self.run).attempt_numbers())
            wait_until(lambda: len(RunDirectory(self.run).attempt_numbers()) > attempts, process)


@pytest.mark.parametrize(
    ("layout", "starts"),
    [
        pytest.param("parallel.zero=0", [["rank", "launcher"], ["all ranks", None]], marks=pytest.mark.long),
        pytest.param("parallel.zero=3", [["rank in mid-save", "launcher"], ["rank", None]], marks=pytest.mark.full),
        pytest.param("parallel.pp=2", [["all ranks", "rank in mid-save", None]], marks=pytest.mark.full),
    ],
)
def test_a_run_killed_at_random_moments_is_bitwise_the_undisturbed_one(
    home: Path, layout: str, starts: list[list[str | None]]
) -> None:
    reference, run = home / f"undisturbed-{layout}", home / f"killed-{layout}"
    train_here(home, overrides(reference, home / "text", *LONG, layout))
    words = command("train", *overrides(run, home / "text", *LONG, layout))
    killer = Killer(run, seed=len(layout))
    for victims in starts:
        with started(home, words) as process:
            for victim in victims:
                if victim is not None:
                    killer.strike(process, victim)
            output, _ = process.communicate(timeout=120)
            wait_until_gone(home)
    assert process.returncode == 0, output
    assert killer.kills == [victim for victims in starts for victim in victims if victim is not None]
    assert steps_of(run) == steps_of(reference)
    assert_same_state(run, reference)
    ending = read_ending(RunDirectory(run), RunDirectory(run).attempt_numbers()[-1])
    assert ending is not None and ending.outcome is Outcome.COMPLETED
    for attempt in RunDirectory(run).attempt_numbers():
        assert read_ending(RunDirectory(run), attempt) is not None, f"attempt {attempt} has no outcome"
    assert not list(RunDirectory(run).checkpoints.glob("*.partial"))


def test_a_killed_rank_is_named_in_one_line_and_until_then_no_port_is_open_to_other_machines(home: Path) -> None:
    run = home / "named"
    words = overrides(run, home / "text", "launch.max_restarts=0", "steps=100000", "schedule.total_steps=30")
    with started(home, ["env", "-u", "GLOO_SOCKET_IFNAME", *command("train", *words)]) as process:
        wait_until(lambda: last_step(run) >= 3, process)
        ranks = rank_pids(run)
        assert listening_addresses([process.pid, *ranks.values()]) == {LOOPBACK}
        assert b"GLOO_SOCKET_IFNAME=lo" in Path(f"/proc/{ranks[0]}/environ").read_bytes().split(b"\0")
        kill(ranks[1])
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in output
    ending = read_ending(RunDirectory(run), 1)
    assert ending is not None and (ending.outcome, ending.rank) == (Outcome.FAILED, 1)


@pytest.mark.full
def test_kill_of_torchrun_leaves_no_rank_and_the_next_start_resumes(home: Path) -> None:
    run = home / "torchrun"
    words = overrides(run, home / "text", f"steps={STEPS}", "checkpoint.every=2")
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
    with started(home, [*torchrun, *words]) as process:
        wait_until(lambda: last_step(run) >= 5, process)
        kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)
        wait_until_gone(home)
    assert finish(home, command("train", *words))[0] == 0
    ending = read_ending(RunDirectory(run), 1)
    assert ending is not None and ending.outcome is Outcome.FAILED and "no exit record" in ending.message
    assert [step[0] for step in steps_of(run)] == list(range(1, STEPS + 1))
