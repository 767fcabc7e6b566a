"""Injected faults: each takes effect once, and the run equals one without a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.conf.faults import Fault, read_faults
from stoker.conf.rundir import RunDirectory
from stoker.trainer.report.metrics import read
from stoker.trainer.runtime.outcome import read_ending
from tests.launch.runs import (
    assert_same_state,
    command,
    finish,
    overrides,
    steps_of,
    train_forked,
    train_here,
    wait_until_gone,
    write_text,
)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"at": 7, "do": "kil"}, "{at: 7, do: kil}: do must be one of kill, "),
        ({"at": 7}, "do must be one of"),
        ({"do": "kill"}, "at=STEP is missing"),
        ({"at": 0, "do": "kill"}, "at must be a whole number from 1 on"),
        ({"at": 7, "do": "kill", "rank": -1}, "rank must be a whole number from 0 on"),
        ({"at": 7, "do": "kill", "rank": True}, "rank must be a whole number"),
        ({"at": 7, "do": "kill", "steps": 3}, "do: kill has no steps; it has at, rank"),
        ({"at": 7, "do": "slow", "seconds": float("inf")}, "seconds must be a number from 0 on"),
        ({"at": 7, "do": "nan", "where": "loss"}, "do: nan has no where; it has at, rank, steps"),
    ],
)
def test_what_is_no_fault_is_answered_in_one_line(entry: dict, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        read_faults([entry])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_fault_twice_is_refused_as_it_strikes_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        read_faults([{"at": 7, "do": "kill"}, {"at": 7, "do": "kill", "rank": 0}])
    assert read_faults([{"at": 7, "do": "slow"}]) == [Fault(7, "slow", steps=30)]


@pytest.mark.long
def test_faults_strike_once_over_all_restarts_and_leave_no_trace_in_what_is_computed(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    reference, run = tmp_path / "undisturbed", tmp_path / "struck"
    words = ["steps=16", "checkpoint.every=3", "launch.max_restarts=4"]
    train_here(tmp_path, overrides(reference, tmp_path / "text", *words))
    faults = (
        "faults=[{at: 2, do: slow, seconds: 0.01, steps: 2}, {at: 4, rank: 1, do: kill}, {at: 5, rank: 1, do: kill},"
        " {at: 7, rank: 1, do: net_loss}, {at: 8, rank: 1, do: disk_full}]"
    )
    status, output = finish(tmp_path, command("train", *overrides(run, tmp_path / "text", *words, faults)))
    assert status == 0, output
    wait_until_gone(tmp_path)
    assert steps_of(run) == steps_of(reference)
    assert_same_state(run, reference)
    directory = RunDirectory(run)
    endings = [read_ending(directory, number) for number in directory.attempt_numbers()]
    messages = [ending.message for ending in endings if ending is not None]
    assert len(messages) == 4 and "rank 1 was killed by SIGKILL" in messages[0]
    assert "rank 1 was killed by SIGKILL" in messages[1], messages
    failed = [step["checkpoint_step"] for step in read(directory.metrics) if step.get("checkpoint_failed")]
    assert failed == [9] and "No space left on device" in output
    assert sorted(path.name.rpartition("-")[2] for path in (run / "faults").iterdir()) == [
        "disk_full", "kill", "kill", "net_loss", "slow",
    ]  # fmt: skip


def test_an_out_of_memory_error_ends_the_run_with_settings_that_need_less(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    run = tmp_path / "small"
    status, output = train_forked(tmp_path, overrides(run, tmp_path / "text", "faults=[{at: 3, do: oom}]"))
    ending = read_ending(RunDirectory(run), 1)
    assert status == 1 and ending is not None and not ending.retry
    assert ending.message.startswith("out of memory in ") and "; no single setting is estimated to fit" in output


def test_a_nan_on_one_rank_is_skipped_by_all_and_training_continues(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    run = tmp_path / "poisoned"
    words = ["steps=6", "parallel.zero=3", "faults=[{at: 3, rank: 1, do: nan, steps: 2}]"]
    status, output = train_forked(tmp_path, overrides(run, tmp_path / "text", *words))
    assert status == 0, output
    steps = read(RunDirectory(run).metrics)
    assert [step["step"] for step in steps if step["skipped"]] == [3, 4]
    assert steps[-1]["updates"] == 4 and steps[-1]["loss"] is not None
