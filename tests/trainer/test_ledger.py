"""What a step's result does to the progress of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.schema import Config
from parallel.update import Agreed
from trainer.ledger import Ledger, Progress
from trainer.outcome import Outcome
from trainer.process import Phases


class Result:
    """A `StepResult` that is there already."""

    def __init__(self, skipped: bool, overflowed: bool) -> None:
        self.agreed = Agreed(2.0, float("inf"), 10, skipped, frozenset(), 2.0**10, overflowed)

    def read(self) -> Agreed:
        return self.agreed


def booked(folder: Path, results: list[Result]) -> tuple[Progress, Outcome | None]:
    config = Config(precision="fp16")
    config.nonfinite.limit = 3
    progress = Progress()
    ledger = Ledger(config, progress, None, Phases(folder / "stamp"))
    outcome = None
    for step, result in enumerate(results, 1):
        given: Any = result
        ledger.enter(step, 1e-3, given, None, {})
        outcome = ledger.settle(everything=True).outcome
    return progress, outcome


def test_bad_steps_in_a_row_end_a_run(tmp_path: Path) -> None:
    progress, outcome = booked(tmp_path, [Result(False, False), *[Result(True, False)] * 3])
    assert outcome is Outcome.NONFINITE and (progress.step, progress.updates) == (4, 1)


def test_a_loss_scale_that_looks_for_its_place_does_not(tmp_path: Path) -> None:
    progress, outcome = booked(tmp_path, [Result(True, True)] * 9)
    assert outcome is None and (progress.step, progress.updates, progress.skipped_in_a_row) == (9, 0, 0)
    _, outcome = booked(tmp_path, [*[Result(True, False)] * 2, *[Result(True, True)] * 5, Result(True, False)])
    assert outcome is Outcome.NONFINITE, "an overflow does not excuse the bad steps around it"
