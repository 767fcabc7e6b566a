"""Series of a run of any length in bounded memory, with their extremes kept: what charts draw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

MOST_POINTS = 480  # of a curve: more than a chart has columns
MOST_CURVES = 200  # of a run; a metrics file of another may name any number of metrics


@dataclass(slots=True)
class Point:
    """Some steps in a row of a curve; one step, where there are few."""

    first: int
    last: int
    count: int
    total: float
    least: float
    most: float

    @property
    def step(self) -> float:
        return (self.first + self.last) / 2

    @property
    def mean(self) -> float:
        return self.total / self.count

    def merge(self, other: Point) -> None:
        """Take in the steps of `other`, which follow."""
        self.last = other.last
        self.count += other.count
        self.total += other.total
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)


class Curve:
    """One metric over steps, in at most `MOST_POINTS` points.

    A point covers equally many steps (a power of two) and keeps their least and largest value, so that no spike is
    lost. Steps must rise: others are left out, as are values that are not finite.
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._width = 1

    def add(self, step: int, value: float) -> None:
        if not abs(value) < 1e300 or (self.points and step <= self.points[-1].last):  # sums of more are not finite
            return
        value = value if abs(value) > 1e-300 else 0.0  # a denormal number has no digits left for a scale
        if self.points and step // self._width == self.points[-1].first // self._width:
            self.points[-1].merge(Point(step, step, 1, value, value, value))
            return
        self.points.append(Point(step, step, 1, value, value, value))
        while len(self.points) > MOST_POINTS:
            self._halve()

    def _halve(self) -> None:
        self._width *= 2
        merged: list[Point] = []
        for point in self.points:
            if merged and merged[-1].first // self._width == point.first // self._width:
                merged[-1].merge(point)
            else:
                merged.append(point)
        self.points = merged

    @property
    def least(self) -> float:
        return min((point.least for point in self.points), default=math.nan)

    @property
    def most(self) -> float:
        return max((point.most for point in self.points), default=math.nan)


class Curves:
    """The curves of all numbers in the steps of a run, by metric, and the newest value of each."""

    def __init__(self) -> None:
        self.by_metric: dict[str, Curve] = {}
        self.newest: dict[str, float] = {}
        self.left_out: set[str] = set()  # metrics past `MOST_CURVES`

    def add(self, step: dict[str, Any]) -> None:
        number = step["step"]
        for key, value in step.items():
            if type(value) not in (int, float) or key == "step":
                continue
            curve = self.by_metric.get(key)
            if curve is None:
                if len(self.by_metric) >= MOST_CURVES:
                    if len(self.left_out) < MOST_CURVES:
                        self.left_out.add(key)
                    continue
                curve = self.by_metric[key] = Curve()
            curve.add(number, value)
            self.newest[key] = value

    def of(self, metric: str) -> Curve | None:
        """The curve of a metric that has a value, else None."""
        curve = self.by_metric.get(metric)
        return curve if curve is not None and curve.points else None
