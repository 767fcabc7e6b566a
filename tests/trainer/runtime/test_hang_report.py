"""Real processes that are stuck, each in its way, are distinguished, and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.hang_report import WAITING, Finding, last_collective, table
from stoker.trainer.runtime.outcome import Outcome, read_ending
from stoker.trainer.runtime.process import Phase, read_stamps
from stoker.trainer.runtime.watchdog import Watchdog

STUCK = {  # kind of tests/trainer/runtime/stuck.py: its state in the table
    "stopped": "stopped by a signal (SIGSTOP)",
    "in C": "in a C call, asleep",
    "in C with the interpreter": "in a C call that keeps the interpreter, asleep",
    "computing in C": "in a C call that keeps the interpreter, computing",
    "asleep": "in Python, asleep",
    "computing": "in Python, computing",
}


def examined(folder: Path, *kinds: str) -> tuple[RunDirectory, str, str]:
    """Have processes of these kinds, which are the ranks of an attempt, looked after; all that is said, and how they
    ended."""
    run = RunDirectory(folder)
    run.attempt(1).mkdir(parents=True)
    home = Path(__file__).parents[3]
    program = [sys.executable, "-P", "-m", "tests.trainer.runtime.stuck", str(folder), *kinds]
    environment = {**os.environ, "PYTHONPATH": str(home)}
    said: list[str] = []
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            until = time.monotonic() + 60
            while len([s for s in read_stamps(run.attempt(1)).values() if s.phase is Phase.UPDATE]) < len(kinds):
                assert time.monotonic() < until and process.poll() is None, "they do not come so far"
                time.sleep(0.05)
            watchdog = Watchdog(run, 1, range(len(kinds)), 1.0, said.append)
            while not watchdog.look():
                assert time.monotonic() < until, "nothing is seen"
                time.sleep(0.05)
            ended, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                for stamp in read_stamps(run.attempt(1)).values():
                    os.kill(stamp.pid, signal.SIGKILL)
    return run, "\n".join(said), ended


def test_the_state_of_a_rank_follows_from_the_kernel_and_its_answers(tmp_path: Path) -> None:
    run, said, ended = examined(tmp_path, *STUCK)
    lines = said.splitlines()
    for rank, state in enumerate(STUCK.values()):
        (line,) = [line for line in lines if line.startswith(f"{rank} ")]
        assert f"  {state}  " in line + "  ", line
    assert "stuck.py" in said and "locked_twice" in said and "computing_in_python" in said
    assert ended.strip() == str([-signal.SIGKILL.value] * len(STUCK))
    ending = read_ending(run, 1)
    assert ending is not None and ending.outcome is Outcome.HUNG


@pytest.mark.long
def test_who_answers_at_once_is_still_seen_to_compute(tmp_path: Path) -> None:
    _, said, _ = examined(tmp_path, "computing", "asleep")
    assert "in Python, computing" in said and "in Python, asleep" in said


def test_a_rank_in_a_collective_that_the_others_have_left_is_named_as_one_that_waits(tmp_path: Path) -> None:
    run, said, _ = examined(tmp_path, "in a collective", "out of it")
    assert f"  {WAITING}  " in said and "all_reduce" in said
    assert said.splitlines()[-1].startswith("rank 0 on ") and "for ranks that have left it" in said
    entries = json.loads(run.flight(1, 0).read_text())["entries"]
    assert [entry["profiling_name"] for entry in entries][-1] == "gloo:all_reduce", entries


def entry(number: int, state: str, **more: object) -> dict[str, object]:
    name = {"profiling_name": "nccl:all_reduce", "process_group": ["3", "dp_shard"], "input_sizes": [[4, 8]]}
    return {**name, "collective_seq_id": number, "state": state, **more}


def test_the_report_names_the_collective_that_a_rank_is_in() -> None:
    flight = json.dumps({"entries": [entry(6, "completed"), entry(7, "started"), entry(8, "scheduled")]})
    assert last_collective(flight) == "all_reduce 7 of dp_shard (4x8): started"
    assert last_collective(json.dumps({"entries": [entry(6, "completed")]})).endswith("6 of dp_shard (4x8): completed")
    sent = entry(9, "started", is_p2p=True, p2p_seq_id=2, profiling_name="nccl:send 0->1")
    assert last_collective(json.dumps({"entries": [sent]})) == "send 0->1 2 of dp_shard (4x8): started"
    assert [last_collective(text) for text in ("", "{", '{"entries": []}')] == ["", "", ""]
    findings = [Finding(1, "b", 7, Phase.UPDATE, 9.0, WAITING, "x.py:1 f", last_collective(flight))]
    assert table(findings).splitlines()[-1] == "rank 1: last collective all_reduce 7 of dp_shard (4x8): started"
