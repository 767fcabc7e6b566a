"""A curve of any length keeps its extremes, its ends and its mean in a bounded number of points."""

from __future__ import annotations

import math

import pytest

from stoker.trainer.report.curves import MOST_CURVES, MOST_POINTS, Curve, Curves


@pytest.mark.parametrize("steps", [1, MOST_POINTS, MOST_POINTS + 1, 20_000])
def test_no_spike_is_lost(steps: int) -> None:
    curve = Curve()
    values = [math.sin(step) for step in range(1, steps + 1)]
    values[steps // 3] = 50.0
    values[steps // 2] = -50.0
    for step, value in enumerate(values, 1):
        curve.add(step, value)
    assert (curve.least, curve.most) == (min(values), max(values))
    assert len(curve.points) <= MOST_POINTS and len(curve.points) >= min(steps, MOST_POINTS // 2)
    assert (curve.points[0].first, curve.points[-1].last) == (1, steps)
    assert sum(point.count for point in curve.points) == steps
    assert sum(point.total for point in curve.points) == pytest.approx(sum(values))
    assert all(before.last < after.first for before, after in zip(curve.points, curve.points[1:], strict=False))


def test_what_is_not_finite_or_out_of_order_is_left_out() -> None:
    curve = Curve()
    for step, value in ((5, 1.0), (6, math.inf), (7, math.nan), (4, 9.0), (5, 9.0), (8, 2.0), (9, 1e305), (10, 1e-310)):
        curve.add(step, value)
    assert [(point.first, point.mean) for point in curve.points] == [(5, 1.0), (8, 2.0), (10, 0.0)]


def test_a_gap_of_a_billion_steps_takes_no_room() -> None:
    curve = Curve()
    for step in [*range(1, 600), *range(10**9, 10**9 + 600)]:
        curve.add(step, 1.0)
    assert len(curve.points) <= MOST_POINTS and curve.points[-1].last == 10**9 + 599


def test_only_so_many_metrics_are_kept() -> None:
    curves = Curves()
    for step in (1, 2):
        curves.add({"step": step, "loss": 1.0, "skipped": True, "name": "x", **{f"m{n}": n for n in range(1000)}})
    assert len(curves.by_metric) == MOST_CURVES and curves.newest["loss"] == 1.0
    assert curves.of("skipped") is None and curves.of("name") is None and curves.of("loss") is not None
