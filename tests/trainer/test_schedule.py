from __future__ import annotations

import itertools

import pytest

from stoker.conf.schema import OptimConfig, ScheduleConfig
from stoker.trainer.schedule import learning_rate

OPTIM = OptimConfig(lr=2.0)


def rates(**values: object) -> list[float]:
    schedule = ScheduleConfig(total_steps=100, final=0.1, **values)  # type: ignore[arg-type]
    return [learning_rate(schedule, OPTIM, step) for step in range(1, 121)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    for name in ("constant", "cosine", "wsd"):
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


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="zigzag"):
        rates(name="zigzag")
