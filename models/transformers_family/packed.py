"""The share of a rank in a weight that holds several projections of the same size, one after the other."""

from __future__ import annotations

from torch import Tensor

from stoker.parallel.registry import Entry, Piece
from stoker.parallel.shards import Chunk
from stoker.parallel.tensor.axis import TensorAxis


def packed_entry(name: str, parameter: Tensor, dim: int, packed: int, axis: TensorAxis, unit: int = 1) -> Entry:
    """Equally many units, of `unit` channels, of each of the `packed` projections along `dim`.

    Raises ValueError where they do not divide.
    """
    shape = tuple(parameter.shape)
    part, rest = divmod(shape[dim], packed * unit)
    if rest:
        raise ValueError(f"{shape[dim]} channels are not {packed} projections of heads of {unit}")
    share = axis.equal_share(part)
    pieces = []
    for number in range(packed):
        sizes, here, there = list(shape), [0] * len(shape), [0] * len(shape)
        sizes[dim] = len(share) * unit
        here[dim], there[dim] = number * len(share) * unit, (number * part + share.start) * unit
        pieces.append(Piece(Chunk(tuple(here), tuple(sizes)), Chunk(tuple(there), tuple(sizes))))
    return Entry(name, shape, tuple(pieces))
