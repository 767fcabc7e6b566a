"""`log.plan=true`: a start's plan and the messages of one of its steps, in the run, and no number changed by them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.launch.cli import main
from stoker.trainer.plan import record as plan_record
from stoker.trainer.report.messages import read_counted
from stoker.trainer.report.predicted import Predicted, read_predicted
from stoker.trainer.runtime.outcome import Beginning, write_beginning
from tests.extent import some
from tests.launch.runs import (
    assert_same_state,
    command,
    finish,
    overrides,
    processes_of,
    rank_pids,
    started,
    steps_of,
    train_here,
    wait_until,
    wait_until_gone,
)
from tests.trainer.test_validate import with_values

SHORT = ["steps=4", "checkpoint.every=4", "tracker=none"]
LAYOUTS = [
    ["parallel.zero=3"],
    ["parallel.pp=2", "parallel.zero=1"],
    ["parallel.tp=2", "parallel.zero=0", "activation_checkpointing=selective"],
    ["parallel.cp=2", "parallel.zero=2", "optim=muon"],
    ["parallel.zero=0"],
]


@pytest.mark.long
@pytest.mark.parametrize("layout", some(LAYOUTS, len(LAYOUTS)), ids=" ".join)
def test_messages_of_a_step_are_those_of_the_plan_and_counting_them_changes_nothing(
    home: Path, layout: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    plain, counted = (home / f"{name}-{layout[0]}" for name in ("plain", "counted"))
    train_here(home, overrides(plain, home / "text", *SHORT, *layout))
    train_here(home, overrides(counted, home / "text", *SHORT, *layout, "log.plan=true"))
    assert steps_of(counted) == steps_of(plain)
    assert_same_state(counted, plain)
    assert read_counted(RunDirectory(plain), 1) is None
    found = read_counted(RunDirectory(counted), 1)
    assert found is not None and found.step == 2 and len(found.messages) > 1
    assert main(["plan", "--run", str(counted), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["messages"]
    assert len(rows) == len(found.messages) and all(row["equal"] for row in rows), rows
    assert main(["plan", "--run", str(counted)]) == 0
    table = capsys.readouterr().out.partition("messages of rank 0, step 2")[2].splitlines()[1:]
    assert len(table) == len(rows) and all(line.endswith("equal") for line in table)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """The process of an attempt's plan, here: at once, as no processor need be idle for it."""

    def record(run: Path, attempt: int) -> None:
        for effect in ("_give_way", "die_with"):
            monkeypatch.setattr(plan_record, effect, lambda *_: None)
        monkeypatch.setattr("sys.argv", ["plan_record", str(run), str(attempt), "2", "1"])
        plan_record.main()

    return record


@pytest.mark.long
def test_the_plan_of_a_start_is_made_once_a_launch_and_never_fails_a_run(
    home: Path, recorded: Callable[[Path, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = home / "planned"
    words = overrides(run, home / "text", *SHORT, "launch.max_restarts=0", "log.plan=true")
    status, output = finish(home, command("train", *words))
    assert status == 0, output
    wait_until_gone(home)
    directory = RunDirectory(run)
    recorded(run, 1)
    first = read_predicted(directory, 1)
    assert first is not None and first.ranks == 2 and first.messages

    def fails(run: RunDirectory, ranks: int) -> Predicted:
        raise ValueError("it cannot be rehearsed")

    monkeypatch.setattr(plan_record, "_made", fails)
    for number, launch in ((2, directory.launch(1).read_bytes()), (3, b"another")):
        directory.attempt(number).mkdir()
        directory.launch(number).write_bytes(launch)
        write_beginning(directory, number, Beginning(0.0, 2, 2, "host", None, launch.decode()))
        recorded(run, number)
    assert read_predicted(directory, 2) == first
    assert read_predicted(directory, 3) is None
    assert (directory.attempt(3) / "plan.log").read_text() == "no plan: it cannot be rehearsed\n"


@pytest.mark.long
def test_under_a_foreign_torchrun_rank_0_has_the_plan_written(home: Path) -> None:
    run = home / "torchrun"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["steps=1000000", "schedule.total_steps=30", "checkpoint.every=0", "tracker=none", "log.plan=true"]
    with started(home, [*torchrun, "-m", "stoker.trainer", *overrides(run, home / "text", *words)]) as process:
        (recorder,) = wait_until(recorders(home), process)
        assert parent_of(recorder) == wait_until(lambda: rank_pids(run).get(0), process)
        wait_until(lambda: os.sched_getscheduler(recorder) == os.SCHED_IDLE, process)
        os.sched_setscheduler(recorder, os.SCHED_OTHER, os.sched_param(0))  # on a busy machine it would wait for days
        os.setpriority(os.PRIO_PROCESS, recorder, 0)
        predicted = wait_until(lambda: read_predicted(RunDirectory(run), 1), process)
        RunDirectory(run).stop.touch()
        output, _ = process.communicate(timeout=60)
        wait_until_gone(home)
    assert process.returncode == 0, output
    assert (predicted.ranks, predicted.kind) == (2, "cpu") and predicted.messages


def recorders(home: Path) -> Callable[[], list[int]]:
    """The processes that write plans of the runs under `home`, as often as they are looked for."""

    def find() -> list[int]:
        words = {pid: (Path("/proc") / str(pid) / "cmdline").read_bytes() for pid in processes_of(home)}
        return [pid for pid, found in words.items() if plan_record.__name__.encode() in found]

    return find


def parent_of(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])


def test_a_plan_is_written_where_processors_idle_beside_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (0, 1):
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)  # noqa: B023
        asked = [with_values(*words) for words in ([], ["launch.device=cpu"], ["log.plan=false"], ["log.plan=true"])]
        assert [plan_record.wants_plan(config) for config in asked] == [count > 0, False, False, True]
