"""Shards: the rectangles of global tensors that live on a rank.

Everything that leaves an engine (checkpoints, exports, comparisons) is described in these terms, so that it depends
on neither the layout nor the engine that made it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

PARAMETER = "param"  # the kind of the fp32 parameters; optimizer state is "optim.<key>", e.g. "optim.exp_avg"
BUFFER = "buffer"  # the kind of persistent buffers
GRADIENT = "grad"  # of the summed loss of the global batch; never in a checkpoint of a run


@dataclass(frozen=True, order=True)
class Rectangle:
    """A box inside a global tensor: `offset` and `size` per dim. A scalar has no dims and one element."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def rows(self, start: int, stop: int) -> Rectangle:
        """Rows start to stop (counted inside this rectangle) of dim 0."""
        return Rectangle((self.offset[0] + start, *self.offset[1:]), (stop - start, *self.size[1:]))

    def moved(self, by: tuple[int, ...]) -> Rectangle:
        """The same box, `by` further along each dim."""
        return Rectangle(tuple(start + step for start, step in zip(self.offset, by, strict=True)), self.size)

    def intersection(self, other: Rectangle) -> Rectangle | None:
        """The elements in both, or None. For scalars the scalar itself."""
        offset = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        ends = (min(a + m, b + n) for a, m, b, n in zip(self.offset, self.size, other.offset, other.size, strict=True))
        size = tuple(end - start for start, end in zip(offset, ends, strict=True))
        return Rectangle(offset, size) if all(n > 0 for n in size) else None

    def within(self, outer: Rectangle) -> tuple[slice, ...]:
        """Index of this rectangle in a tensor that holds `outer`."""
        pairs = zip(self.offset, self.size, outer.offset, strict=True)
        return tuple(slice(start - base, start - base + n) for start, n, base in pairs)


def whole(shape: tuple[int, ...]) -> Rectangle:
    """The rectangle that covers a tensor of `shape`."""
    return Rectangle((0,) * len(shape), tuple(shape))


def flat_range(shape: tuple[int, ...], start: int, stop: int) -> tuple[Rectangle, ...]:
    """The rectangles that elements `start` to `stop` of a flattened (row-major) tensor of `shape` are, in their order.

    Of a matrix at most three: the rest of the first row, whole rows, the beginning of the last one. Each further dim
    adds two. An empty range has none.
    """
    if start >= stop:
        return ()
    if not shape:
        return (Rectangle((), ()),)
    row = math.prod(shape[1:])
    first, begin = divmod(start, row)
    last, end = divmod(stop, row)
    if first == last:  # within one row
        return _of_row(first, flat_range(shape[1:], begin, end))
    found: list[Rectangle] = []
    if begin:
        found += _of_row(first, flat_range(shape[1:], begin, row))
        first += 1
    if last > first:
        found.append(Rectangle((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return (*found, *_of_row(last, flat_range(shape[1:], 0, end)))


def _of_row(row: int, inside: tuple[Rectangle, ...]) -> tuple[Rectangle, ...]:
    return tuple(Rectangle((row, *part.offset), (1, *part.size)) for part in inside)


@dataclass(frozen=True)
class Shard:
    """One rectangle of one global tensor, with the live local tensor that holds it.

    `data` has the shape `rectangle.size` and shares the engine's storage: reading it sees the present values, writing
    it changes them. The same rectangle lives on `replicas` ranks, of which this one is number `replica`.
    """

    name: str  # global name of the parameter
    kind: str  # PARAMETER, BUFFER, GRADIENT or "optim.<key>"
    shape: tuple[int, ...]  # of the global tensor
    rectangle: Rectangle
    data: Tensor
    replica: int = 0
    replicas: int = 1
