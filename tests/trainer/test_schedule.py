from __future__ import annotations

import itertools
import math

import pytest

from stoker.conf.schema import OptimConfig, ScheduleConfig
from stoker.trainer.schedule import learning_rate

OPTIM = OptimConfig(lr=2.0)


def rates(**values: object) -> list[float]:
    schedule = ScheduleConfig(total_steps=100, final=0.1, **values)  # type: ignore[arg-type]
    return [learning_rate(schedule, OPTIM, step) for step in range(1, 121)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    for name in ("constant", "linear", "cosine", "inverse_sqrt", "wsd"):
        assert rates(name=name, warmup_steps=10)[:10] == pytest.approx([0.2 * step for step in range(1, 11)])


def test_constant_stays() -> None:
    assert set(rates(name="constant")) == {2.0}


def test_cosine_falls_from_the_peak_to_the_final_share_and_stays_there() -> None:
    rate = rates(name="cosine", warmup_steps=20)
    assert rate[59] == pytest.approx(0.2 + 1.8 * 0.5)  # half way between warmup and the end
    assert all(a >= b for a, b in itertools.pairwise(rate[19:]))
    assert rate[99:] == [pytest.approx(0.2)] * 21


def test_warmup_stable_decay_holds_the_peak_until_the_decay() -> None:
    rate = rates(name="wsd", warmup_steps=5, decay_fraction=0.25)
    assert rate[4:75] == [2.0] * 71
    assert rate[75] == pytest.approx(2.0 - 1.8 / 25)
    assert rate[99:] == [pytest.approx(0.2)] * 21


def test_linear_falls_in_equal_steps() -> None:
    rate = rates(name="linear", warmup_steps=20)
    assert rate[19] == 2.0 and rate[59] == pytest.approx(0.2 + 1.8 * 0.5) and rate[99:] == [pytest.approx(0.2)] * 21


def test_inverse_square_root_continues_from_the_warmup_to_the_final_share() -> None:
    rate = rates(name="inverse_sqrt", warmup_steps=4)
    assert rate[3] == 2.0 and rate[15] == pytest.approx(1.0) and rate[63] == pytest.approx(0.5)
    assert rate[99:] == [pytest.approx(0.4)] * 21, "it ends with the schedule"
    assert rates(name="inverse_sqrt")[0] == 2.0
    late = learning_rate(ScheduleConfig(name="inverse_sqrt", total_steps=10_000, final=0.1), OPTIM, 9_000)
    assert late == pytest.approx(0.2), "the final share is the least"


def test_a_cosine_with_restarts_begins_each_longer_cycle_near_the_peak() -> None:
    rate = rates(name="cosine", warmup_steps=10, cycle_steps=30, cycle_growth=2.0)
    assert rate[9] == 2.0 and rate[39] == pytest.approx(0.2)
    assert 1.99 < rate[40] < 2.0 and rate[69] == pytest.approx(0.2 + 1.8 * 0.5)
    assert rate[99] == pytest.approx(0.2) and rate[100:] == [pytest.approx(0.2)] * 20
    even = rates(name="linear", cycle_steps=25)
    assert even[24::25] == [pytest.approx(0.2)] * 4


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_warmup_stable_decay_has_several_decays_and_returns_to_the_peak(shape: str, half: float) -> None:
    rate = rates(name="wsd", decays=[[21, 30], [51, 60]], decay_shape=shape, decay_fraction=0.2)
    for start in (20, 50):
        assert rate[start - 1] == 2.0 and rate[start + 4] == pytest.approx(0.2 + 1.8 * half)
        assert rate[start + 9] == pytest.approx(0.2) and rate[start + 10] == 2.0
    assert rate[79] == 2.0 and rate[89] == pytest.approx(0.2 + 1.8 * half) and rate[99] == pytest.approx(0.2)


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="zigzag"):
        rates(name="zigzag")
