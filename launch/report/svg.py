"""Line charts as SVG, from curves: a band from least to largest, a line through the means, axes with round numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stoker.launch.report.escaping import text
from stoker.trainer.report.curves import Curve, Point

WIDTH, HEIGHT = 460, 250  # of the drawing; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 10, 30
_LOG_FROM = 8.0  # largest / least, from which on a scale is logarithmic
_CLIPPED = 4.0  # times the 95th percentile: what is above is cut off, and named
COLOURS = 6  # of the page's style sheet: --c0, --c1, ...


@dataclass(frozen=True)
class Line:
    """A curve in a chart."""

    label: str
    curve: Curve
    colour: int
    dots: bool = False  # values at few steps, each of which is marked
    dashed: bool = False
    band: bool = True


@dataclass
class Chart:
    """Curves over steps that share one scale."""

    title: str
    unit: str
    lines: list[Line] = field(default_factory=list)
    marks: Sequence[tuple[int, str]] = ()  # steps with a vertical line, and why
    from_zero: bool = False
    stacked: bool = False  # each line on top of the one before; their points are of the same steps

    def draw(self) -> str:
        """The `<svg>` element."""
        lines = [line for line in self.lines if line.curve.points]
        if not lines:
            return ""
        bands = _stack(lines) if self.stacked else None
        first = min(line.curve.points[0].first for line in lines)
        last = max(line.curve.points[-1].last for line in lines)
        scale, above = self._scale(lines, bands)
        across = _Linear(first, max(last, first + 1), _LEFT, WIDTH - _RIGHT)
        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(self.title)}">']
        for value, label in zip(ticks := scale.ticks(), labels(ticks), strict=True):
            y = scale(value)
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        for value, label in zip(ticks := across.ticks(), labels(ticks), strict=True):
            at, anchor = across(value), "end" if across(value) > WIDTH - 3 * _RIGHT else "middle"
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{label}</text>')
        for step, why in self.marks:
            if first <= step <= last:
                at = across(step + 0.5)
                title = f"<title>{text(why)}</title>"
                parts.append(f'<path class="mark" d="M{at:.1f} {_TOP}V{HEIGHT - _BOTTOM}">{title}</path>')
        for place, line in enumerate(lines):
            if bands is not None:
                parts.append(_area(bands[place], line.colour, across, scale))
            else:
                parts += _drawn(line, across, scale)
        parts.append("</svg>")
        if above is not None:
            parts.append(f'<p class="note">cut off above; the largest value is {short(above)}</p>')
        return "".join(parts)

    def _scale(self, lines: Sequence[Line], bands: list[_Band] | None) -> tuple[_Scale, float | None]:
        """The vertical scale, and the largest value where the scale ends below it."""
        if bands is not None:
            tops = sorted(top for _, _, top in bands[-1])
            least, most = 0.0, tops[-1]
        else:
            least = min(line.curve.least for line in lines)
            most = max(line.curve.most for line in lines)
            tops = sorted(point.most for line in lines for point in line.curve.points)
        if not self.from_zero and bands is None and least > 0 and most / least > _LOG_FROM:
            return _Log(least, most, HEIGHT - _BOTTOM, _TOP), None
        usual = tops[int(len(tops) * 0.95)] if len(tops) > 1 else most
        above = None
        if self.from_zero and most > _CLIPPED * usual > 0:
            above, most = most, _CLIPPED / 2 * usual
        elif self.from_zero or bands is not None:
            most += 0.06 * most
        low = min(0.0, least) if self.from_zero or bands is not None else least
        if most - low <= abs(most) * 1e-9:  # a constant
            low, most = low - (abs(low) * 0.1 or 1.0) * (low != 0), most + (abs(most) * 0.1 or 1.0)
        return _Linear(low, most, HEIGHT - _BOTTOM, _TOP), above


_Band = list[tuple[float, float, float]]  # step, lower edge, upper edge


class _Scale(Protocol):
    """From values to places in the drawing."""

    def __call__(self, value: float) -> float: ...

    def ticks(self) -> list[float]: ...


class _Linear(_Scale):
    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """At most six round numbers."""
        rough = (self.high - self.low) / 5
        size = 10 ** math.floor(math.log10(rough))
        gap = next((size * factor for factor in (1, 2, 5) if size * factor >= rough), size * 10)
        first = math.ceil(self.low / gap - 1e-9)
        found = [(first + number) * gap for number in range(7)]
        return [value for value in found if value <= self.high + gap * 1e-6]


class _Log(_Scale):
    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._inner = _Linear(math.log10(low), math.log10(high), start, end)

    def __call__(self, value: float) -> float:
        return self._inner(math.log10(value)) if value > 0 else self._inner.start

    def ticks(self) -> list[float]:
        low, high = self._inner.low, self._inner.high
        decades = range(math.floor(low), math.ceil(high) + 1)
        every = max(1, len(decades) // 6)
        factors = (1, 2, 5) if len(decades) <= 3 else (1, 3) if len(decades) <= 4 else (1,)
        found = [factor * 10.0**decade for decade in decades if decade % every == 0 for factor in factors]
        return [value for value in found if low - 1e-9 <= math.log10(value) <= high + 1e-9]


def _drawn(line: Line, across: _Scale, scale: _Scale) -> list[str]:
    points, style = line.curve.points, f"--c:var(--c{line.colour % COLOURS})"
    parts = []
    if line.band and any(point.most > point.least for point in points):
        edge = [(point.step, point.least, point.most) for point in points]
        parts.append(_area(edge, line.colour, across, scale, "band"))
    path = _path([(across(point.step), scale(point.mean)) for point in points])
    dashed = ' stroke-dasharray="5 4"' if line.dashed else ""
    parts.append(f'<path class="line" style="{style}" d="{path}"{dashed}/>')
    if line.dots or len(points) == 1:
        parts += [_dot(point, style, across, scale) for point in points[:: max(1, len(points) // 60)]]
    return parts


def _dot(point: Point, style: str, across: _Scale, scale: _Scale) -> str:
    place = f'cx="{across(point.step):.1f}" cy="{scale(point.mean):.1f}"'
    return f'<circle style="{style}" {place} r="3"><title>step {point.last:,}: {point.mean:.6g}</title></circle>'


def _area(band: _Band, colour: int, across: _Scale, scale: _Scale, kind: str = "area") -> str:
    there = _path([(across(step), scale(top)) for step, _, top in band])
    back = _path([(across(step), scale(bottom)) for step, bottom, _ in reversed(band)])
    return f'<path class="{kind}" style="--c:var(--c{colour % COLOURS})" d="{there}L{back[1:]}Z"/>'


def _stack(lines: Sequence[Line]) -> list[_Band]:
    """Each line's band above those before it, at the steps of the first line."""
    heights = [0.0] * len(lines[0].curve.points)
    found = []
    for line in lines:
        band: _Band = []
        for place, (point, own) in enumerate(zip(lines[0].curve.points, line.curve.points, strict=False)):
            bottom = heights[place]
            heights[place] += own.mean
            band.append((point.step, bottom, heights[place]))
        found.append(band)
    return found


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def labels(values: Sequence[float]) -> list[str]:
    """`values` in as few digits as keep them apart."""
    for digits in range(3, 12):
        found = [short(value, digits) for value in values]
        if len(set(found)) == len(found):
            break
    return found


def short(value: float, digits: int = 3) -> str:
    """`0`, `0.05`, `512`, `1.5k`, `33M`, `1.2B`, `3e-4`."""
    size = abs(value)
    if size == 0:
        return "0"
    if 1e-3 <= size < 999.5e12:
        for unit in ("", "k", "M", "B", "T"):
            if size < 999.5:
                return f"{value:.{digits}g}{unit}"
            value, size = value / 1000, size / 1000
    mantissa, _, exponent = f"{value:.{max(0, digits - 2)}e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"
