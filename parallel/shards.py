"""Shards: the chunks of global tensors that a rank holds.

Everything that leaves an engine (checkpoints, exports, comparisons) is described in these terms, so that it depends
on neither the layout nor the engine that made it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PARAMETER = "param"  # the kind of the parameters: trained ones in fp32, frozen ones in the dtype they compute in.
# Optimizer state is "optim.<key>", e.g. "optim.exp_avg"
BUFFER = "buffer"  # the kind of persistent buffers
GRADIENT = "grad"  # of the summed loss of the global batch; never in a checkpoint of a run
# Of an element, by the dtype's name in safetensors files; `stoker.parallel.dtypes` has torch's dtypes of these names.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, order=True)
class Chunk:
    """A box inside a global tensor: `offset` and `size` per dim. A scalar has no dims and one element."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def rows(self, start: int, stop: int) -> Chunk:
        """Rows start to stop (counted inside this chunk) of dim 0."""
        return Chunk((self.offsets[0] + start, *self.offsets[1:]), (stop - start, *self.sizes[1:]))

    def moved(self, by: tuple[int, ...]) -> Chunk:
        """The same box, `by` further along each dim."""
        return Chunk(tuple(start + step for start, step in zip(self.offsets, by, strict=True)), self.sizes)

    def intersection(self, other: Chunk) -> Chunk | None:
        """The elements in both, or None. For scalars the scalar itself."""
        offset = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        ends = (
            min(a + m, b + n) for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        size = tuple(end - start for start, end in zip(offset, ends, strict=True))
        return Chunk(offset, size) if all(n > 0 for n in size) else None

    def within(self, outer: Chunk) -> tuple[slice, ...]:
        """Index of this chunk in a tensor that holds `outer`."""
        pairs = zip(self.offsets, self.sizes, outer.offsets, strict=True)
        return tuple(slice(start - base, start - base + n) for start, n, base in pairs)


def whole(shape: tuple[int, ...]) -> Chunk:
    """The chunk that covers a tensor of `shape`."""
    return Chunk((0,) * len(shape), tuple(shape))


def flat_range(shape: tuple[int, ...], start: int, stop: int) -> tuple[Chunk, ...]:
    """The chunks that elements `start` to `stop` of a flattened (row-major) tensor of `shape` are, in their order.

    Of a matrix at most three: the rest of the first row, whole rows, the beginning of the last one. Each further dim
    adds two. An empty range has none.
    """
    if start >= stop:
        return ()
    if not shape:
        return (Chunk((), ()),)
    row = math.prod(shape[1:])
    first, begin = divmod(start, row)
    last, end = divmod(stop, row)
    if first == last:  # within one row
        return _of_row(first, flat_range(shape[1:], begin, end))
    found: list[Chunk] = []
    if begin:
        found += _of_row(first, flat_range(shape[1:], begin, row))
        first += 1
    if last > first:
        found.append(Chunk((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return (*found, *_of_row(last, flat_range(shape[1:], 0, end)))


def _of_row(row: int, inside: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
    return tuple(Chunk((row, *part.offsets), (1, *part.sizes)) for part in inside)


@dataclass(frozen=True)
class Shard:
    """One chunk of one global tensor, with the live local tensor that holds it.

    `data` has the shape `chunk.sizes` and shares the engine's storage: reading it gives the present values, writing
    it changes them. `replicas` ranks hold the same chunk; this one is number `replica`.
    """

    name: str  # global name of the parameter
    kind: str  # PARAMETER, BUFFER, GRADIENT or "optim.<key>"
    shape: tuple[int, ...]  # of the global tensor
    chunk: Chunk
    data: Tensor
    replica: int = 0
    replicas: int = 1
