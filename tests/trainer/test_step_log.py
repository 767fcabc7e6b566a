"""What a step's result does to the progress of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stoker.conf.schema import Config
from stoker.parallel.update import ControlFlag, StepMetrics
from stoker.trainer.runtime.outcome import Outcome, Superseded
from stoker.trainer.runtime.process import Phases
from stoker.trainer.step_log import Progress, StepLog


class Result:
    """A `StepResult` that is there already."""

    def __init__(self, skipped: bool, overflowed: bool, *votes: ControlFlag) -> None:
        self.agreed = StepMetrics(2.0, float("inf"), 10, skipped, frozenset(votes), 2.0**10, overflowed)

    def read(self) -> StepMetrics:
        return self.agreed


def booked(folder: Path, results: list[Result]) -> tuple[Progress, Outcome | None]:
    config = Config(precision="fp16")
    config.nonfinite.limit = 3
    progress = Progress()
    step_log = StepLog(config, progress, None, Phases(folder / "stamp"))
    outcome = None
    for step, result in enumerate(results, 1):
        given: Any = result
        step_log.enter(step, 1e-3, given, None, {})
        outcome = step_log.settle(everything=True).outcome
    return progress, outcome


def test_bad_steps_in_a_row_end_a_run(tmp_path: Path) -> None:
    progress, outcome = booked(tmp_path, [Result(False, False), *[Result(True, False)] * 3])
    assert outcome is Outcome.NONFINITE and (progress.step, progress.updates) == (4, 1)


def test_a_loss_scale_that_looks_for_its_place_does_not(tmp_path: Path) -> None:
    progress, outcome = booked(tmp_path, [Result(True, True)] * 9)
    assert outcome is None and (progress.step, progress.updates, progress.skipped_in_a_row) == (9, 0, 0)
    _, outcome = booked(tmp_path, [*[Result(True, False)] * 2, *[Result(True, True)] * 5, Result(True, False)])
    assert outcome is Outcome.NONFINITE, "an overflow does not excuse the bad steps around it"


def late_ledger(folder: Path, on_error: str) -> tuple[StepLog, Progress]:
    config, progress = Config(), Progress()
    config.checkpoint.on_error = on_error
    return StepLog(config, progress, None, Phases(folder / "stamp")), progress


def enter(step_log: StepLog, step: int, *votes: ControlFlag) -> None:
    result: Any = Result(False, False, *votes)
    step_log.enter(step, 1e-3, result, None, {})


def test_a_request_to_save_takes_effect_a_step_late_and_then_every_result_is_read(tmp_path: Path) -> None:
    step_log, progress = late_ledger(tmp_path, "warn")
    enter(step_log, 1, ControlFlag.SAVE)
    assert not step_log.settle(everything=False).save and progress.step == 0
    enter(step_log, 2, ControlFlag.SAVE)
    verdict = step_log.settle(everything=False)
    assert verdict.save and verdict.outcome is None and progress.step == 2, "what is saved is the state after step 2"
    enter(step_log, 3)
    enter(step_log, 4)
    assert not step_log.settle(everything=False).save and progress.step == 3


def test_a_save_that_failed_on_any_rank_ends_the_run_only_if_that_is_the_policy(tmp_path: Path) -> None:
    for on_error, outcome in (("warn", None), ("fail", Outcome.FAILED)):
        step_log, _ = late_ledger(tmp_path, on_error)
        enter(step_log, 1, ControlFlag.SAVE_FAILED)
        enter(step_log, 2)
        assert step_log.settle(everything=False).outcome is outcome


@pytest.mark.parametrize("flag", ControlFlag)
def test_no_flag_is_ignored(tmp_path: Path, flag: ControlFlag) -> None:
    step_log, _ = late_ledger(tmp_path, "fail")
    enter(step_log, 1, flag)
    try:
        verdict = step_log.settle(everything=True)
    except Superseded:
        return
    assert verdict.save or verdict.outcome is not None
