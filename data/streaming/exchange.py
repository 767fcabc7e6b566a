"""Communication between the readers of streams, behind a protocol that a test can implement."""

from __future__ import annotations

import zlib
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from stoker.parallel.layout import OF_ONE_MODEL
from stoker.parallel.mesh import Mesh


class Exchange(Protocol):
    """Between the ranks. Every method is called by all ranks, in the same order."""

    @property
    def reads(self) -> bool:
        """Whether this rank reads: one rank of each model-parallel group does."""
        ...

    def gather(self, mine: np.ndarray) -> np.ndarray:
        """int64 `[n]` of every reader, one after the other in data-parallel order; those of other ranks are ignored."""
        ...

    def share(self, rows: np.ndarray) -> None:
        """Fill int32 `rows` of the ranks that do not read with those of their group's reader."""
        ...

    def compare(self, rows: np.ndarray) -> None:
        """Raises RuntimeError when the model-parallel group does not hold equal `rows`."""
        ...


class Alone:
    """One rank."""

    reads = True

    def gather(self, mine: np.ndarray) -> np.ndarray:
        return mine

    def share(self, rows: np.ndarray) -> None:
        pass

    def compare(self, rows: np.ndarray) -> None:
        pass


class Ranks:
    """The ranks of a mesh, over separate gloo groups: this is called from another thread than training."""

    def __init__(self, mesh: Mesh) -> None:
        """A collective: it makes the groups."""
        layout = mesh.layout
        self._peers = layout.groups(*OF_ONE_MODEL)  # each model-parallel group, in rank order; the first rank reads
        readers = sorted((peers[0] for peers in self._peers), key=layout.dp_rank)
        mine = next(peers for peers in self._peers if mesh.rank in peers)
        self.reads = mesh.rank == mine[0]
        self._reader, self._readers = mine[0], len(readers)
        self._across = self._within = None
        if len(readers) > 1:
            self._across = dist.new_group(readers, timeout=mesh.timeout, backend="gloo")
        if len(mine) > 1:
            for peers in self._peers:
                group = dist.new_group(peers, timeout=mesh.timeout, backend="gloo")
                if mesh.rank in peers:
                    self._within = group

    def gather(self, mine: np.ndarray) -> np.ndarray:
        found = torch.from_numpy(mine.astype(np.int64))
        if self.reads and self._across is not None:
            sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self._readers)]
            dist.all_gather(sizes, torch.tensor([len(found)]), group=self._across)
            most = max(1, *(int(size) for size in sizes))
            parts = [torch.empty(most, dtype=torch.int64) for _ in sizes]
            padded = torch.zeros(most, dtype=torch.int64)
            padded[: len(found)] = found
            dist.all_gather(parts, padded, group=self._across)
            found = torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
        if self._within is not None:
            size = torch.tensor([len(found)])
            dist.broadcast(size, self._reader, group=self._within)
            if not self.reads:
                found = torch.empty(int(size), dtype=torch.int64)
            dist.broadcast(found, self._reader, group=self._within)
        return found.numpy()

    def share(self, rows: np.ndarray) -> None:
        if self._within is not None:
            dist.broadcast(torch.from_numpy(rows), self._reader, group=self._within)

    def compare(self, rows: np.ndarray) -> None:
        if self._within is None:
            return
        check = zlib.crc32(rows.tobytes())
        most = torch.tensor([check, -check])
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._within)
        if most.tolist() != [check, -check]:
            raise RuntimeError("the ranks of a model-parallel group hold different rows")
