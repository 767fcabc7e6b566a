"""The tokens of each expert in each layer as one picture: a row for a layer, a column for an expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stoker.trainer.report.routing import OVERLOADED

_WIDTH, _LEFT, _BOTTOM = 940, 54, 24
_ROW, _LEAST_ROW, _ROWS = 16.0, 3.0, 420.0  # height of a row, and of all of them from where rows are lower
_LABELS = 16  # of layers, and of experts

_IDLE, _OVERLOADED = "without a token", f"{OVERLOADED:g} times the mean or more"
# Load of an expert, its tokens over the mean of its layer, below which it belongs to the class; colour, opacity.
_CLASSES = (
    (0.0, _IDLE, "--lost", 0.9),
    (0.5, "below 0.5", "--c0", 0.12),
    (0.8, "0.5 to 0.8", "--c0", 0.28),
    (1.25, "0.8 to 1.25", "--c0", 0.48),
    (2.0, "1.25 to 2", "--c0", 0.72),
    (OVERLOADED, f"2 to {OVERLOADED:g}", "--c0", 1.0),
    (float("inf"), _OVERLOADED, "--c1", 1.0),
)


@dataclass(frozen=True)
class ExpertTokens:
    """Of the newest step whose line has them."""

    step: int
    layers: Mapping[int, Sequence[int]]  # tokens of each expert by layer, equally many and one at least in each

    @classmethod
    def of(cls, step: Mapping[str, Any]) -> ExpertTokens | None:
        """From a line of `metrics.jsonl`; None where it has none, or others than this version writes."""
        found = step.get("expert_tokens")
        if not isinstance(found, dict) or not found:
            return None
        rows = list(found.values())
        if not all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows):
            return None
        if not all(key.isdecimal() and len(key) < 10 for key in found):
            return None
        if not all(type(tokens) is int and 0 <= tokens < 1 << 63 for row in rows for tokens in row):
            return None
        return cls(step["step"], dict(sorted((int(key), row) for key, row in found.items())))

    @property
    def experts(self) -> int:
        return len(next(iter(self.layers.values())))

    def loads(self) -> dict[int, list[float]]:
        """Tokens over the mean of their layer."""
        return {
            layer: [tokens * len(row) / total if (total := sum(row)) else 0.0 for tokens in row]
            for layer, row in self.layers.items()
        }

    def in_words(self) -> str:
        """The busiest expert, and how many have no token."""
        loads = self.loads()
        most, layer, expert = max((load, -layer, -n) for layer, row in loads.items() for n, load in enumerate(row))
        idle = sum(not load for row in loads.values() for load in row)
        words = f"step {self.step:,}: expert {-expert} of layer {-layer} has most, {most:.2f} x the mean of its layer"
        return f"{words}; {idle:,} of {self.experts * len(loads):,} have no token" if idle else words

    def draw(self) -> str:
        """The `<svg>` element: one path for each class, so that ten thousand experts are a file of moderate size."""
        across = (_WIDTH - _LEFT) / self.experts
        down = max(_LEAST_ROW, min(_ROW, _ROWS / len(self.layers)))
        gap = min(1.0, across / 8, down / 8)
        cells: dict[str, list[str]] = {label: [] for _, label, _, _ in _CLASSES}
        for place, row in enumerate(self.loads().values()):
            for expert, load in enumerate(row):
                label = next(label for below, label, _, _ in _CLASSES if load < below or load == below == 0)
                at = f"M{_LEFT + expert * across:.1f} {place * down:.1f}"
                cells[label].append(f"{at}h{across - gap:.1f}v{down - gap:.1f}h-{across - gap:.1f}z")
        height = down * len(self.layers)
        drawn = [
            f'<path fill="var({colour})" fill-opacity="{opacity}" d="{"".join(cells[label])}"/>'
            for _, label, colour, opacity in _CLASSES
            if cells[label]
        ]
        for place, layer in _spread(list(self.layers)):
            y = (place + 0.5) * down + 4
            drawn.append(f'<text x="{_LEFT - 6}" y="{y:.1f}" text-anchor="end">{layer}</text>')
        for place, expert in _spread(list(range(self.experts))):
            x = _LEFT + (place + 0.5) * across
            drawn.append(f'<text x="{x:.1f}" y="{height + 16:.1f}" text-anchor="middle">{expert}</text>')
        box = f'viewBox="0 0 {_WIDTH} {height + _BOTTOM:.1f}" role="img" aria-label="Tokens of experts"'
        return f"<svg {box}>{''.join(drawn)}</svg>"


def key() -> list[tuple[str, str, float]]:
    """What the colours mean: label, colour, opacity."""
    return [(label, colour, opacity) for _, label, colour, opacity in _CLASSES]


def _spread(values: Sequence[int]) -> list[tuple[int, int]]:
    """At most `_LABELS` of them, evenly, with their places."""
    every = -(-len(values) // _LABELS)
    return list(enumerate(values))[::every]
