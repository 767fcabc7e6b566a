"""Two starts of one run: only the newest changes what they share."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.trainer.report.metrics import MetricsFile, last_step
from stoker.trainer.runtime import starts
from stoker.trainer.runtime.starts import Start, attempt_of, begin_attempt, is_superseded
from tests.trainer.report.observed import a_config, record


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def opened(run: RunDirectory, attempt: int, resumed_from: int | None = None) -> MetricsFile:
    metrics = MetricsFile(run.metrics, Start(run, attempt))
    metrics.start(a_config(), resumed_from, 200, {})
    return metrics


def test_attempts_are_found_by_their_launch_also_where_another_comes_between(run: RunDirectory) -> None:
    begin_attempt(run, "ours")
    assert attempt_of(run, "ours", 1) is None and not is_superseded(run, "ours", 1)
    begin_attempt(run, "theirs")
    assert attempt_of(run, "ours", 1) is None and is_superseded(run, "ours", 1)
    begin_attempt(run, "ours")
    assert (attempt_of(run, "ours", 1), attempt_of(run, "theirs", 1)) == (3, 2)
    assert not is_superseded(run, "ours", 1) and is_superseded(run, "theirs", 1)
    assert attempt_of(run, "ours", 0) == 1


def test_a_start_that_another_one_follows_neither_cuts_metrics_off_nor_adds_to_them(run: RunDirectory) -> None:
    old = opened(run, begin_attempt(run, "old"))
    for step in (1, 2, 3):
        old.step(record(step))
    late = MetricsFile(run.metrics, Start(run, 1))  # suspended in its start
    new = opened(run, begin_attempt(run, "new"), resumed_from=2)
    new.step(record(3))
    new.step(record(4))
    kept = run.metrics.read_bytes()
    old.step(record(4))
    old.rolled_back(1)
    late.start(a_config(), None, 200, {})
    for metrics in (old, late):
        metrics.step(record(1))
        metrics.finish("failed", 4)
    assert run.metrics.read_bytes() == kept and last_step(run.metrics) == 4


def test_no_attempt_begins_while_a_start_changes_what_all_share(run: RunDirectory) -> None:
    first = Start(run, begin_attempt(run, "first"))
    began = threading.Event()
    other = threading.Thread(target=lambda: (begin_attempt(run, "second"), began.set()))
    with first.exclusively() as newest:
        other.start()
        assert newest and not began.wait(0.05) and run.attempt_numbers() == [1]
    other.join()
    with first.exclusively() as newest:
        assert not newest


def test_a_suspended_start_keeps_the_lock_for_a_while_only_and_a_file_system_without_locks_is_no_error(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin_attempt(run, "first")
    monkeypatch.setattr(starts, "LOCK_SECONDS", 0.02)
    suspended = os.open(run.attempts, os.O_RDONLY)
    fcntl.flock(suspended, fcntl.LOCK_EX)
    assert begin_attempt(run, "second") == 2 and "has kept its lock" in caplog.text
    os.close(suspended)

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    assert begin_attempt(run, "third") == 3


def test_a_half_written_file_of_a_killed_rank_is_removed_by_the_next_start_and_not_that_of_a_living_one(
    run: RunDirectory,
) -> None:
    dead, living = begin_attempt(run, "dead"), begin_attempt(run, "living")
    ended = subprocess.Popen(["true"])
    ended.wait()
    for attempt, pid in ((dead, ended.pid), (living, os.getpid())):
        (run.attempt(attempt) / "rank-0.stamp").write_text(f"6 update 1.0 {pid} {socket.gethostname()} 1\n")
        run.seconds(attempt).with_suffix(".json.tmp").write_text("{")
    begin_attempt(run, "next")
    assert [path.parent.name for path in run.attempts.glob("*/*.tmp")] == [str(living)]
