from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from stoker.checkpoint import SaveReport
from stoker.conf.rundir import RunDirectory, next_attempt
from stoker.conf.schema import Config
from stoker.parallel.update import ControlFlag
from stoker.trainer.report.observer import StepRecord
from stoker.trainer.runtime.outcome import Outcome
from stoker.trainer.runtime.requests import DEADLINE_VARIABLE, LEAVE_SECONDS, Requests, deadline_of, ending_of
from stoker.trainer.runtime.shutdown_estimate import GRACE_VARIABLE, ShutdownEstimate
from stoker.trainer.runtime.signal_listener import SignalListener
from tests.trainer.runtime.deaf import deaf_for

Left = list[tuple[Outcome, str]]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.fixture
def listening() -> Iterator[tuple[Requests, Left, threading.Event]]:
    """Requests that wait for the first step, what made them leave, and the moment of it."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    requests, left, gone, listener = Requests(), [], threading.Event(), SignalListener()

    def leave(outcome: Outcome, why: str) -> None:
        if not left:
            left.append((outcome, why))
            gone.set()

    requests.listen(leave, listener)
    yield requests, left, gone
    requests.training()
    listener.close()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_files_from_an_earlier_launch_ask_for_nothing_and_those_of_this_one_do(run: RunDirectory) -> None:
    run.stop.touch()
    requests = Requests()
    requests.watch(run, 1, forget=True)
    assert requests.votes() == frozenset()
    run.stop.touch()
    run.save.touch()
    assert requests.votes() == {ControlFlag.STOP, ControlFlag.SAVE}
    again = Requests()
    again.watch(run, 1, forget=False)
    assert again.votes() == {ControlFlag.STOP, ControlFlag.SAVE}, "requested while the ranks were restarting"
    run.requeue.touch()
    assert ControlFlag.PREEMPT in again.votes()
    Requests().watch(run, 1, forget=False)
    assert not run.requeue.exists(), "a start is the answer to it"


def test_a_save_is_a_vote_so_many_minutes_after_the_last_one_or_the_first_step(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("stoker.trainer.runtime.requests.time.monotonic", lambda: clock[0])
    requests, other_rank = Requests(), Requests()
    requests.watch(run, 1, forget=True, save_minutes=15.0)
    found = []
    for clock[0], event in (
        (9000.0, None),  # a start may take hours
        (9000.0, requests.training), (9899.0, None), (9900.0, None), (9901.0, None),
        (9901.0, requests.saving), (10800.0, None), (10801.0, None),
    ):  # fmt: skip
        if event is not None:
            event()
        found.append(ControlFlag.SAVE in requests.votes())
    assert found == [False, False, False, True, True, False, False, True]
    other_rank.training()
    clock[0] = 1e9
    assert other_rank.votes() == frozenset(), "one clock counts, that of the rank that watches"


def test_another_start_of_the_run_is_a_vote_from_its_first_moment(run: RunDirectory) -> None:
    requests = Requests()
    requests.watch(run, next_attempt(run), forget=True)
    assert requests.votes() == frozenset()
    next_attempt(run)
    assert requests.votes() == {ControlFlag.SUPERSEDED}


@pytest.mark.parametrize(
    ("number", "outcome"),
    [(signal.SIGTERM, Outcome.PREEMPTED), (signal.SIGUSR1, Outcome.PREEMPTED), (signal.SIGINT, Outcome.STOPPED)],
)
def test_a_signal_while_training_is_a_vote(
    listening: tuple[Requests, Left, threading.Event], number: signal.Signals, outcome: Outcome
) -> None:
    requests, left, _ = listening
    requests.training()
    os.kill(os.getpid(), number)
    assert ending_of(requests.votes()) is outcome and requests.why() == number.name
    assert not left


def test_a_signal_during_start_up_is_handled_while_the_main_thread_hangs(
    listening: tuple[Requests, Left, threading.Event],
) -> None:
    _, left, _ = listening
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    deaf_for(1.0)
    assert left == [(Outcome.PREEMPTED, "SIGTERM")]


def test_a_stop_file_and_a_deadline_are_heeded_during_start_up(
    run: RunDirectory, listening: tuple[Requests, Left, threading.Event]
) -> None:
    requests, left, gone = listening
    deadline = time.time() + LEAVE_SECONDS + 2.0
    requests.watch(run, 1, forget=True, deadline=deadline)
    assert not gone.wait(0.5), "there is time left"
    assert gone.wait(20.0) and time.time() < deadline, "too late"
    assert left[0][0] is Outcome.PREEMPTED and "deadline" in left[0][1]


def test_the_end_begins_early_enough_before_the_deadline(run: RunDirectory) -> None:
    requests = Requests()
    requests.watch(run, 1, forget=True, deadline=time.time() + 30)
    assert requests.votes() == frozenset()
    requests.grace = lambda: 31.0
    assert requests.votes() == {ControlFlag.PREEMPT}
    run.stop.touch()
    assert ending_of(requests.votes()) is Outcome.STOPPED, "a person's stop stays one"


def test_the_earlier_of_two_deadlines_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = datetime(2026, 12, 24, 18).timestamp()
    assert deadline_of("2026-12-24T18:00") == config and deadline_of(None) is None
    monkeypatch.setenv(DEADLINE_VARIABLE, str(config - 60))
    assert deadline_of("2026-12-24T18:00") == config - 60


@pytest.mark.parametrize(("given", "verdict"), [("120", "the scheduler gives 120 s"), ("3", "gives only 3 s")])
def test_the_grace_needed_is_compared_with_the_one_given(
    monkeypatch: pytest.MonkeyPatch, given: str, verdict: str
) -> None:
    monkeypatch.setenv(GRACE_VARIABLE, given)
    said: list[str] = []
    grace = ShutdownEstimate(None, said.append)
    grace.start(Config(), None, 10, {})
    assert not said, "nothing has been measured yet"
    for step in range(3):
        grace.step(StepRecord(step, step, 1.0, 1.0, 1.0, 1, 1.0, 0.5, 0.0))
    grace.checkpoint(SaveReport(2, seconds=4.0))
    assert grace.needed == pytest.approx(5.0)
    assert len(said) == 1 and "about 5.0 s" in said[0] and verdict in said[0]
    grace.checkpoint(SaveReport(3, seconds=4.1))
    assert len(said) == 1, "said once"
    resumed = ShutdownEstimate(None, said.append)
    resumed.recall([{"step_seconds": 0.5, "checkpoint_seconds": 4.0}])
    resumed.start(Config(), 3, 10, {})
    assert len(said) == 2 and verdict in said[1], "a resumed run has an estimate at its start"


def test_a_deadline_before_anything_was_measured_is_met_by_a_guess() -> None:
    grace = ShutdownEstimate(time.time() + 60, lambda _: None)
    assert grace.needed == 0.0 and grace.with_margin() == pytest.approx(16.0)
    grace.step(StepRecord(1, 1, 1.0, 1.0, 1.0, 1, 1.0, 0.5, 0.0))
    assert grace.with_margin() == pytest.approx(1.5 * (1.0 + 5.0) + 1.0), "no save has been measured"
    grace.checkpoint(SaveReport(1, seconds=2.0))
    assert grace.with_margin() == pytest.approx(1.5 * (1.0 + 2.0) + 1.0)
