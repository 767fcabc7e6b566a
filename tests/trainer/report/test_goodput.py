"""Every second of a run is booked once, only from the files of the run directory."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.trainer.report.goodput import BOOK_OF, BOOKS, MOMENTS, Booking, accounts, goodput
from stoker.trainer.runtime.outcome import Ending, Outcome, write_ending
from stoker.trainer.runtime.process import Phase, Phases


def attempt(
    run: RunDirectory,
    number: int,
    began: float,
    seconds: dict[str, float],
    resumed_from: int = 0,
    marks: list[tuple[int, dict[str, float]]] | None = None,
    ended: float | None = None,
    outcome: Outcome = Outcome.FAILED,
) -> None:
    run.attempt(number).mkdir(parents=True)
    until = began + sum(seconds.values())
    values = {
        "began": began, "time": until, "resumed_from": resumed_from, "seconds": seconds, "marks": marks or [],
    }  # fmt: skip
    run.seconds(number).write_text(json.dumps(values))
    (run.attempt(number) / "rank-0.stamp").write_text(f"9 update {until:.3f} 1 host 1\n")
    if ended is not None:
        write_ending(run, number, Ending(outcome, "", time=ended))


def test_work_after_the_checkpoint_that_the_next_attempt_resumed_from_is_lost(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    marks = [
        (5, {"startup": 10.0, "training": 40.0, "data": 4.0}),
        (10, {"startup": 10.0, "training": 80.0, "data": 8.0}),
    ]
    attempt(run, 1, 1000.0, {"startup": 10.0, "training": 100.0, "data": 10.0}, 0, marks, ended=1120.0)
    attempt(
        run, 2, 1150.0, {"startup": 5.0, "training": 50.0}, resumed_from=10, ended=1205.0, outcome=Outcome.COMPLETED
    )
    found = goodput(run)
    assert found.seconds["lost"] == pytest.approx(20 + 2)
    assert found.seconds["training"] + found.seconds["data"] == pytest.approx(80 + 8 + 50)
    assert found.seconds["startup"] == pytest.approx(15)
    assert found.seconds["down"] == pytest.approx(30)
    assert found.total == pytest.approx(205.0)


def test_an_attempt_that_saved_nothing_is_lost_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    attempt(run, 1, 1000.0, {"startup": 10.0, "training": 100.0}, ended=1110.0)
    attempt(run, 2, 1110.0, {"startup": 10.0, "training": 20.0}, ended=1140.0, outcome=Outcome.COMPLETED)
    found = goodput(run)
    assert (found.seconds["lost"], found.seconds["training"]) == pytest.approx((100, 20))


def test_a_start_that_ended_early_takes_nothing_from_those_before_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    attempt(run, 1, 1000.0, {"training": 100.0}, 0, [(10, {"training": 90.0})], ended=1100.0)
    run.attempt(2).mkdir(parents=True)
    attempt(run, 3, 4e9, {"training": 20.0}, resumed_from=10, ended=4e9 + 20, outcome=Outcome.COMPLETED)
    found = goodput(run)
    assert (found.seconds["training"], found.seconds["lost"]) == pytest.approx((110, 10))


def test_going_back_over_several_attempts_loses_the_work_of_all_of_them(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    attempt(run, 1, 1000.0, {"training": 100.0}, 0, [(5, {"training": 50.0}), (10, {"training": 100.0})], ended=1100.0)
    attempt(run, 2, 1100.0, {"training": 30.0}, 10, [(13, {"training": 30.0})], ended=1130.0)
    attempt(run, 3, 1130.0, {"training": 20.0}, 5, ended=1150.0, outcome=Outcome.COMPLETED)
    found = goodput(run)
    assert (found.seconds["training"], found.seconds["lost"]) == pytest.approx((50 + 20, 50 + 30))


def test_the_time_of_a_hang_is_no_training(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    attempt(run, 1, 1000.0, {"startup": 10.0, "training": 100.0}, 0, [(9, {"training": 100.0})], 1410.0, Outcome.HUNG)
    attempt(run, 2, 1410.0, {"startup": 10.0, "training": 20.0}, 9, ended=1440.0, outcome=Outcome.COMPLETED)
    found = goodput(run)
    assert found.seconds["training"] == pytest.approx(120)
    assert found.seconds["down"] == pytest.approx(300)
    assert found.total == pytest.approx(440.0)


def test_a_running_run_is_booked_until_now_and_an_ended_one_until_its_last_record(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    attempt(run, 1, 1000.0, {"startup": 10.0, "training": 100.0})
    assert goodput(run, now=1111.0).total == pytest.approx(111.0)
    assert goodput(run).total == pytest.approx(110.0)


def test_a_start_that_ended_early_is_startup(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.attempt(1).mkdir(parents=True)
    began = run.attempt(1).stat().st_mtime
    (run.attempt(1) / "rank-0.stamp").write_text(f"0 build {began + 7:.3f} 1 host 1\n")
    found = goodput(run)
    assert found.seconds["startup"] == pytest.approx(7, abs=0.1)
    assert found.total == pytest.approx(found.seconds["startup"], abs=0.1)
    assert goodput(run, now=began + 20).seconds["startup"] == pytest.approx(20, abs=0.1), "it has not begun to train"


def test_a_run_without_an_attempt_has_no_seconds(tmp_path: Path) -> None:
    assert goodput(RunDirectory(tmp_path)).total == 0.0


def test_what_an_attempt_books_is_all_its_time_and_a_rollback_moves_some_to_lost(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.attempt(1).mkdir(parents=True)
    phase = Phases(run.attempt(1) / "rank-0.stamp")
    booking = Booking(run.seconds(1), phase, 0)
    for step in range(1, 5):
        phase(step, Phase.DATA)
        phase(step, Phase.FORWARD_BACKWARD)
        until = phase.totals()[Phase.FORWARD_BACKWARD] + 0.02
        while phase.totals()[Phase.FORWARD_BACKWARD] < until:
            pass
        phase(step, Phase.SAVE)
        if step == 2:
            booking.saving(step)
    phase.take_seconds()
    marked = json.loads(run.seconds(1).read_text())["marks"][0][1]["training"]
    booking.rolled_back(2)
    record = json.loads(run.seconds(1).read_text())
    assert set(record["seconds"]) == set(BOOKS) - {"down"}
    assert sum(record["seconds"].values()) == pytest.approx(record["time"] - record["began"], abs=0.02)
    assert record["seconds"]["lost"] >= 0.04
    assert record["seconds"]["training"] == pytest.approx(marked) and marked >= 0.04


def moments_of(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, seconds: int, save_at: int = -1) -> Booking:
    """An attempt that books training for so many seconds of a clock, with a save of 10 s of them in between."""
    run.attempt(1).mkdir(parents=True)
    phase = Phases(run.attempt(1) / "rank-0.stamp")
    now = began = float(int(time.time()) + 1)  # behind the stamp that `phase` has written
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr("stoker.trainer.report.goodput.process_start", lambda _: began)
    monkeypatch.setattr("stoker.trainer.report.goodput.write_whole", lambda path, data: path.write_bytes(data))
    spent = {Phase.UPDATE: 0.0, Phase.SAVE: 0.0}
    monkeypatch.setattr(phase, "totals", lambda: dict(spent))
    booking = Booking(run.seconds(1), phase, 0)
    for second in range(seconds):
        now += 1
        spent[Phase.SAVE if save_at <= second < save_at + 10 else Phase.UPDATE] += 1
        booking.write()
    return booking


def test_a_span_shows_when_a_save_was_and_the_spans_are_the_books(tmp_path: Path, monkeypatch) -> None:
    run = RunDirectory(tmp_path)
    moments_of(run, monkeypatch, 100, save_at=60)
    [account] = accounts(run)
    saves = [span for span in account.spans if "checkpoint" in span.seconds]
    assert [span.began - account.began for span in saves] == [60.0 + second for second in range(10)]
    for name in BOOKS:
        assert sum(span.seconds.get(name, 0.0) for span in account.spans) == pytest.approx(account.seconds[name])


def test_an_attempt_of_any_length_keeps_so_many_moments_over_all_of_it(tmp_path: Path, monkeypatch) -> None:
    run = RunDirectory(tmp_path)
    moments_of(run, monkeypatch, 600, save_at=300)
    assert MOMENTS // 2 <= len(json.loads(run.seconds(1).read_text())["moments"]) <= MOMENTS
    [account] = accounts(run)
    assert max(sum(span.seconds.values()) for span in account.spans) < 600 / 30
    saves = [span for span in account.spans if "checkpoint" in span.seconds]
    assert all(285 <= span.began - account.began < 310 for span in saves)
    assert sum(span.seconds["checkpoint"] for span in saves) == pytest.approx(10)


def test_what_a_later_start_or_a_rollback_lost_is_at_its_time(tmp_path: Path, monkeypatch) -> None:
    run = RunDirectory(tmp_path)
    booking = moments_of(run, monkeypatch, 50)
    booking.saving(7)
    record = json.loads(run.seconds(1).read_text())
    record["seconds"]["training"] += 30
    record["time"] += 30
    run.seconds(1).write_text(json.dumps(record))
    later = record["began"] + 100
    attempt(run, 2, later, {"training": 5.0}, resumed_from=7, ended=later + 5, outcome=Outcome.COMPLETED)
    first, second = accounts(run)
    assert [(span.began - first.began, span.seconds) for span in first.spans][-1] == (50.0, {"lost": 30.0})
    assert not any("lost" in span.seconds for span in first.spans[:-1])
    assert [span.seconds for span in second.spans] == [{"training": 5.0}], "a record without moments is one span"
    booking.rolled_back(0)
    assert json.loads(run.seconds(1).read_text())["moments"][20][1]["lost"] == 20.0


def test_every_phase_is_booked() -> None:
    assert BOOK_OF.keys() == set(Phase)
    assert set(BOOK_OF.values()) == set(BOOKS) - {"down"}
