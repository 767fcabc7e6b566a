"""This rank's place on the tp axis, and which share of a layer it holds there."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from stoker.parallel.mesh import Mesh
from stoker.parallel.registry import Entry, Piece
from stoker.parallel.shards import Chunk


@dataclass(frozen=True)
class Share:
    """The units (heads, channels, tokens of the vocabulary) that this rank holds, out of all of a layer."""

    start: int
    stop: int
    replica: int = 0  # this rank's number among those that hold the same units
    replicas: int = 1
    partial: tuple[str, ...] = ()  # the group of those ranks: each computes a part of the gradient

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class TensorAxis:
    """Ranks that share each layer. It exists only where there are at least two of them."""

    mesh: Mesh
    size: int
    rank: int
    group: dist.ProcessGroup
    group_name: str  # torch's, which functional collectives go by
    sequence: bool  # between regions each rank holds its contiguous share of the tokens, `[tokens / size, width]`
    experts: bool = False  # the channels of experts are shared too

    def equal_share(self, units: int) -> Share:
        """Raises ValueError unless every rank can hold equally many of `units`."""
        count, rest = divmod(units, self.size)
        if rest:
            raise ValueError(f"{units} units do not divide over {self.size} tensor-parallel ranks")
        return Share(self.rank * count, (self.rank + 1) * count)

    def share(self, units: int) -> Share:
        """Equally many of `units`; or, where there are fewer units than ranks, one that adjacent ranks hold too.

        Raises ValueError if neither divides the other. A collective if ranks share a unit: it makes their group.
        """
        neighbours, rest = divmod(self.size, units)
        if rest or neighbours <= 1:
            return self.equal_share(units)
        unit, replica = divmod(self.rank, neighbours)
        name = "tp"
        if neighbours < self.size:
            name = f"tp_{neighbours}"
            axis = self.mesh.layout.groups("tp")
            starts = range(0, self.size, neighbours)
            self.mesh.add_groups(name, [ranks[start : start + neighbours] for ranks in axis for start in starts])
        return Share(unit, unit + 1, replica, neighbours, (name,))

    def even_share(self, units: int) -> Share:
        """As evenly as possible: shares differ by one at most. Raises ValueError if there is not one for each rank."""
        if units < self.size:
            raise ValueError(f"{units} units are fewer than {self.size} tensor-parallel ranks")
        return Share(units * self.rank // self.size, units * (self.rank + 1) // self.size)


def tensor_axis(mesh: Mesh, sequence: bool, experts: bool = False) -> TensorAxis | None:
    """The tp axis of `mesh`, None if its size is 1.

    `sequence`: share the tokens between regions. `experts`: share the channels of experts.
    """
    group = mesh.group("tp")
    if group is None:
        return None
    return TensorAxis(mesh, mesh.layout.tp, mesh.coordinate.tp, group, group.group_name, sequence, experts)


def sharded_entry(name: str, shape: tuple[int, ...], dim: int, share: Share, unit: int = 1) -> Entry:
    """The entry of a parameter of the global `shape` of which this rank holds `share` along `dim`.

    `unit` is the size along `dim` of what the share counts.
    """
    offset, size = [0] * len(shape), list(shape)
    offset[dim], size[dim] = share.start * unit, len(share) * unit
    local = Chunk((0,) * len(shape), tuple(size))
    piece = Piece(local, Chunk(tuple(offset), tuple(size)))
    return Entry(name, shape, (piece,), share.replica, share.replicas, share.partial)
