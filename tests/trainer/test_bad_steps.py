"""What is a bad step, what a slow rank, and what the step log concludes: all without a rank."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from stoker.conf.schema import Config
from stoker.parallel.update import StepMetrics
from stoker.trainer.runtime.outcome import Outcome
from stoker.trainer.runtime.process import Phases
from stoker.trainer.runtime.stragglers import STEPS, Stragglers, WorkClock
from stoker.trainer.spikes import LEAST_STEPS, ceilings
from stoker.trainer.step_log import Decision, Progress, StepLog

SOUND = [(step, 2.0 + 0.01 * (step % 5), 1.0) for step in range(1, 41)]


def test_a_ceiling_is_the_median_and_k_robust_deviations() -> None:
    loss, norm = ceilings(SOUND, 42, 6.0, 100)
    # losses are 2.00 to 2.04 in equal parts: median 2.02, median absolute deviation 0.01
    assert loss == pytest.approx(2.02 + 6 * max(1.4826 * 0.01, 0.01 * 2.02))
    assert norm == pytest.approx(1.0 + 6 * 0.01), "a plateau has the least spread"


def test_spikes_in_the_window_hardly_move_it() -> None:
    spiked = [*SOUND[:-4], *((step, 50.0, 50.0) for step in range(37, 41))]
    assert ceilings(spiked, 42, 6.0, 100)[0] < 2.3


def test_nothing_is_a_spike_before_enough_is_known_or_without_k() -> None:
    assert ceilings(SOUND[: LEAST_STEPS - 1], 42, 6.0, 100) == (math.inf, math.inf)
    assert ceilings(SOUND, 42, None, 100) == (math.inf, math.inf)


def test_a_ceiling_does_not_depend_on_whether_the_step_before_is_known_already() -> None:
    rising = [(step, 0.1 * step, 0.1 * step) for step in range(1, 42)]  # every entry more moves the median
    for window in (20, 30):
        known, not_yet = rising[-window - 1 :], rising[:-1][-window - 1 :]
        assert ceilings(known, 42, 3.0, window) == ceilings(not_yet, 42, 3.0, window)


class Result:
    def __init__(self, agreed: StepMetrics) -> None:
        self.agreed = agreed

    def read(self) -> StepMetrics:
        return self.agreed


def verdicts(folder: Path, action: str, bad: set[int], steps: int, **more: Any) -> tuple[Progress, list[Decision]]:
    config = Config()
    config.nonfinite.action = action
    for name, value in more.items():
        setattr(config.nonfinite, name, value)
    progress, found = Progress(), []
    step_log = StepLog(config, progress, None, Phases(folder / "rank-0.stamp"))
    for step in range(1, steps + 1):
        loss = math.nan if step in bad else 2.0
        result: Any = Result(StepMetrics(loss, 1.0, 10, step in bad, frozenset()))
        step_log.enter(step, 1e-3, result, None, {})
        found.append(step_log.settle(everything=False))
    return progress, found


def test_a_bad_step_is_known_one_step_late_and_named(tmp_path: Path) -> None:
    _, found = verdicts(tmp_path, "rollback", {3}, 4)
    assert [verdict.bad_step for verdict in found] == [None, None, None, 3]


def test_stop_ends_the_run_at_the_first_bad_step(tmp_path: Path) -> None:
    _, found = verdicts(tmp_path, "stop", {3}, 4)
    assert [verdict.outcome for verdict in found] == [None, None, None, Outcome.NONFINITE]


@pytest.mark.parametrize(
    ("bad", "ends_at"),
    [({3, 4}, None), ({3, 4, 6, 7}, None), ({3, 4, 5}, 6), ({1, 2, 3}, 4), ({2, 4, 5, 6, 7}, 7)],
    ids=str,
)
def test_a_run_ends_with_as_many_bad_steps_in_a_row_as_the_limit_and_not_before(
    tmp_path: Path, bad: set[int], ends_at: int | None
) -> None:
    """Known one step late."""
    _, found = verdicts(tmp_path, "skip", bad, 8, limit=3)
    ended = [step for step, verdict in enumerate(found, 1) if verdict.outcome is Outcome.NONFINITE]
    assert (ended[0] if ended else None) == ends_at


def test_overflows_of_fp16_do_not_count_as_bad_steps(tmp_path: Path) -> None:
    config = Config()
    config.nonfinite.limit = 2
    progress = Progress()
    step_log = StepLog(config, progress, None, Phases(tmp_path / "rank-0.stamp"))
    for step in range(1, 6):
        step_log.enter(step, 1e-3, Result(StepMetrics(2.0, math.inf, 10, True, frozenset(), overflowed=True)), None, {})
        assert step_log.settle(everything=True).outcome is None
    assert progress.skipped_in_a_row == 0 and progress.updates == 0


def test_only_sound_steps_count_for_the_ceiling(tmp_path: Path) -> None:
    progress, _ = verdicts(tmp_path, "skip", {3}, 6, spike=6.0)
    assert [entry[0] for entry in progress.seen] == [1, 2, 4, 5]
    progress, _ = verdicts(tmp_path, "skip", {3}, 6)
    assert progress.seen == [], "nothing is kept for a rule that is off"


def test_a_rank_is_named_once_when_it_was_slow_for_long_enough() -> None:
    watch = Stragglers()
    named = [watch.book([0.1, 0.15, 0.1]) for _ in range(3 * STEPS)]
    assert named[STEPS - 1] == [(1, pytest.approx(1.5))]
    assert sum(map(len, named)) == 1


def test_a_rank_that_recovers_in_between_or_is_slow_within_the_limit_is_not_named() -> None:
    watch = Stragglers()
    for _ in range(3):
        assert not any(watch.book([0.1, 0.15, 0.1]) for _ in range(STEPS - 1))
        assert watch.book([0.1, 0.1, 0.1]) == []
    assert not any(watch.book([0.1, 0.129, 0.1]) for _ in range(2 * STEPS))


def test_of_two_ranks_the_slow_one_is_named() -> None:
    watch = Stragglers()
    named = [watch.book([0.2, 0.1]) for _ in range(STEPS)]
    assert named[-1] == [(0, pytest.approx(2.0))]


def test_waiting_is_no_work() -> None:
    clock = WorkClock()
    time.sleep(0.2)
    assert clock.take() < 0.1
    until = time.thread_time() + 0.1
    while time.thread_time() < until:
        pass
    assert clock.take() > 0.09
