"""Which source each row of a mixture comes from: a closed form of the row number, in integers.

The sources are the leaves of a binary tree. Of the first n rows at a node, floor((n * left + u) / (left +
right)) go to its left child, where `left` and `right` are the weights below its children. So the rows of a child follow
its share as closely as whole rows can from any row on, and the counts before row n need no list. It is exact
at any row number, because n is divided by the weights before it is multiplied.

In any batch a leaf's rows are off by less than 1 + s1 + s1 s2 + ..., where s1, s2, ... are the shares that it and the
nodes above it, except the root, have of their parents. A tree whose nodes are split as evenly as possible keeps that
sum under 3: the shares above a leaf are about a half, unless a source outweighs all others, and then it is higher in
the tree.

Weights may change at a row (a phase). Every phase counts from its first row, on top of the counts of the phases before,
so earlier rows and each source's order do not change. A source without further rows also ends a phase.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WEIGHT_UNITS = 1 << 30  # about the sum of whole weights: a product of two of them stays below 2**63


@dataclass(frozen=True)
class Phase:
    """Weights from one row on, and the rows of each source before it."""

    first: int  # row
    weights: tuple[int, ...]  # by source; 0: none of its rows
    before: tuple[int, ...]  # rows by source

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """Rows of each source before each of `rows` (int64 `[rows]`, none before `first`): int64 `[sources, rows]`."""
        counts = np.empty((len(self.weights), len(rows)), np.int64)
        _descend(_tree(self.weights), rows - self.first, counts)
        return counts + np.array(self.before, np.int64)[:, None]


@dataclass(frozen=True)
class Mixture:
    """The whole sequence of rows. Made by `mix`."""

    phases: tuple[Phase, ...]
    total_rows: int | None  # None: without end

    def assign(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of the source and the row of that source for each of `rows` (int64 `[rows]`), both int64."""
        sources, numbers = np.empty_like(rows), np.empty_like(rows)
        firsts = np.array([phase.first for phase in self.phases])
        phases = np.searchsorted(firsts, rows, side="right") - 1
        for number in np.unique(phases).tolist():
            chosen = phases == number
            before = self.phases[number].counts(rows[chosen])
            source = (self.phases[number].counts(rows[chosen] + 1) - before).argmax(0)
            sources[chosen], numbers[chosen] = source, np.take_along_axis(before, source[None], 0)[0]
        return sources, numbers

    def counts(self, row: int) -> tuple[int, ...]:
        """How many rows of each source come before `row`."""
        phase = next(phase for phase in reversed(self.phases) if phase.first <= row)
        return _counts(phase, row)


def mix(weights: Sequence[tuple[int, Sequence[int]]], rows: Sequence[int | None]) -> Mixture:
    """The mixture of sources that have `rows` rows each (None: without end).

    `weights` are pairs of a first row, rising from 0, and a whole number for each source, of sum 2**31 at most. A
    source without further rows leaves the mixture, and the others keep their proportions. The end is where
    no source with a weight is left. Raises ValueError for weights that are all 0.
    """
    assert weights[0][0] == 0 and all(sum(wanted) <= 1 << 31 for _, wanted in weights)
    phases: list[Phase] = []
    before = (0,) * len(rows)
    for number, (first, wanted) in enumerate(weights):
        if not any(wanted):
            raise ValueError("a mixture needs a source with a weight above 0")
        if phases:
            before = _counts(phases[-1], first)
        following = weights[number + 1][0] if number + 1 < len(weights) else None
        while following is None or first < following:
            left = tuple(0 if before[k] == limit else wanted[k] for k, limit in enumerate(rows))
            if not any(left):
                return Mixture(tuple(phases) or (Phase(first, tuple(wanted), before),), first)
            phases.append(Phase(first, left, before))
            ends = [_end(phases[-1], k, limit) for k, limit in enumerate(rows) if limit is not None and left[k]]
            if not ends or (following is not None and min(ends) >= following):
                break
            first = min(ends)
            before = _counts(phases[-1], first)
    return Mixture(tuple(phases), None)


def whole_weights(shares: Sequence[float], temperature: float = 1.0) -> tuple[int, ...]:
    """Shares of the tokens as whole weights: `share ** (1 / temperature)`, so that above 1 small sources get more.

    A state keeps the whole weights, so that no rounding of another machine can move a row.
    """
    most = max(shares)
    scaled = [(share / most) ** (1 / temperature) if share else 0.0 for share in shares]
    unit = WEIGHT_UNITS / sum(scaled)
    return tuple(max(1, round(share * unit)) if share else 0 for share in scaled)


def _counts(phase: Phase, row: int) -> tuple[int, ...]:
    return tuple(phase.counts(np.array([row], np.int64))[:, 0].tolist())


def _end(phase: Phase, source: int, limit: int) -> int:
    """The first row at which `source` has contributed `limit` rows."""
    low, high = phase.first, phase.first + 1
    while _counts(phase, high)[source] < limit:
        low, high = high, phase.first + 2 * (high - phase.first)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _counts(phase, middle)[source] >= limit else (middle, high)
    return high


@dataclass(frozen=True)
class _Node:
    weight: int
    children: tuple[_Node, _Node] | None
    source: int  # of a leaf


@functools.lru_cache(maxsize=256)
def _tree(weights: tuple[int, ...]) -> _Node:
    return _split(sorted(((weight, k) for k, weight in enumerate(weights)), reverse=True))


def _split(leaves: list[tuple[int, int]]) -> _Node:
    """The tree of `leaves` (weight and source, heaviest first): each goes to the side that weighs less."""
    if len(leaves) == 1:
        return _Node(leaves[0][0], None, leaves[0][1])
    sides: tuple[list[tuple[int, int]], ...] = ([], [])
    sums = [0, 0]
    for leaf in leaves:
        side = int(sums[1] < sums[0] or (sums[0] == sums[1] and len(sides[1]) < len(sides[0])))
        sides[side].append(leaf)
        sums[side] += leaf[0]
    return _Node(sum(sums), (_split(sides[0]), _split(sides[1])), -1)


def _descend(node: _Node, rows: np.ndarray, counts: np.ndarray) -> None:
    """Write to `counts` how many of the first `rows` at `node` each source below it gets."""
    if node.children is None:
        counts[node.source] = rows
        return
    left, right = node.children
    weight = max(node.weight, 1)  # sources of weight 0 share a node
    whole, rest = np.divmod(rows, weight)
    taken = whole * left.weight + (rest * left.weight + weight // 2) // weight
    _descend(left, taken, counts)
    _descend(right, rows - taken, counts)
