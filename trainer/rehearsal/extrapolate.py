"""From a model of few layers to one of many: what each moment of a step needs grows linearly with the layers.

Marks stand between blocks, forward and backward. The shorter and the longer rehearsal pass the same marks but for the
layers that only the longer one has. A span between two marks is paired with the same one of the other rehearsal,
counted from the first layers or from the last; the difference of the two is what one more period of layers adds to it.
Spans of the additional layers are repeated for all that are left out: the nearer they are to the beginning, the more
they grow like the span before them, the nearer to the end, like the one behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from stoker.trainer.rehearsal.memory import Category, Mark, Peak, Span
from stoker.trainer.rehearsal.work import Work

Growth = Mapping[Category, int]


class NotAlikeError(Exception):
    """The two rehearsals did not pass the same marks."""


def more_layers(
    shorter: Sequence[Span], longer: Sequence[Span], period: int, begins: Mapping[int, int], missing: int
) -> list[Span]:
    """The spans of a rehearsal with `missing` more periods of layers than `longer`, as in `layers.Short`."""

    def additional(mark: Mark) -> bool:
        block = mark.block - 1 if mark.way == "backward" else mark.block
        return mark.block >= 0 and 0 <= block - begins[mark.stage] < period

    found: list[Span] = []
    waiting: list[Span] = []  # additional ones, until the growth of the next is known
    before: Growth = {}
    left = iter(shorter)
    for span in longer:
        if additional(span.mark):
            waiting.append(span)
            continue
        other = next(left, None)
        if other is None or other.mark != _as_in_shorter(span.mark, period, begins):
            raise NotAlikeError
        growth = _difference(span.peak, other.peak)
        if waiting:
            found += _repeated(waiting, before, growth, missing)
            waiting = []
        found.append(Span(span.mark, grown(span.peak, (growth, missing))))
        before = growth
    if waiting or next(left, None) is not None:
        raise NotAlikeError
    return found


def _repeated(spans: Sequence[Span], before: Growth, behind: Growth, missing: int) -> list[Span]:
    return [
        Span(span.mark, grown(span.peak, (before, missing - place), (behind, place)))
        for place in range(missing + 1)
        for span in spans
    ]


def _as_in_shorter(mark: Mark, period: int, begins: Mapping[int, int]) -> Mark:
    if mark.block < 0:
        return mark
    block = mark.block - 1 if mark.way == "backward" else mark.block
    return mark if block < begins[mark.stage] else Mark(mark.way, mark.stage, mark.block - period)


def _difference(longer: Peak, shorter: Peak) -> Growth:
    found = Counter(longer.categories)
    found.subtract(shorter.categories)
    return found


def grown(peak: Peak, *growths: tuple[Growth, int]) -> Peak:
    """`peak` and each growth so many times. Where a category would be negative, the largest one is less."""
    found = Counter(peak.categories)
    for growth, times in growths:
        for category, size in growth.items():
            found[category] += times * size
    below = sum(size for size in found.values() if size < 0)
    kept = {category: size for category, size in found.most_common() if size > 0}
    if below and kept:
        kept[next(iter(kept))] += below
    return Peak(sum(kept.values()), peak.phase, dict(sorted(kept.items(), key=lambda item: -item[1])))


def line(shorter: Peak, longer: Peak, missing: int) -> Peak:
    """The peak with `missing` more periods of layers."""
    return grown(longer, (_difference(longer, shorter), missing))


def more_work(shorter: Work, longer: Work, missing: int) -> Work:
    """The same for operations and messages."""
    return longer.plus(longer.plus(shorter, -1), missing)
