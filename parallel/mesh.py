"""Mesh: this rank's place, device and process groups, in one object that is passed and never global."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout  # no public function changes a timeout

from stoker.parallel.layout import AXES, OF_TOKENS, AxisRole, Coordinate, Layout, View, axes_of, threads_per_rank

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """The groups of one rank. A group of a single rank is None: it needs no communication."""

    layout: Layout
    rank: int
    device: torch.device
    world: dist.ProcessGroup  # all ranks, on the device's backend
    control: dist.ProcessGroup  # all ranks, on gloo: small texts between hosts, as bytes, never as pickles
    timeout: timedelta  # of every group; torch does not pass the default group's on to new ones
    groups: dict[str, dist.ProcessGroup | None] = field(
        default_factory=dict
    )  # those of the axes, and those that `add_groups` added
    nccl: bool = False  # whether the groups of tensors on the device are NCCL's

    @property
    def coordinate(self) -> Coordinate:
        return self.layout.coordinate(self.rank)

    @property
    def dp_rank(self) -> int:
        return self.layout.dp_rank(self.rank)

    def group(self, name: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one only along the axis `name`, or the group that `add_groups` made.

        With a queue the name is `NAME.QUEUE`. `shards` and `replicas` are those of `Layout.sharding` and
        `Layout.replication`; with expert parallelism `ep` is the expert group, and `expert_shards` and
        `expert_replicas` are the ranks with the same experts.
        """
        return self.groups[name]

    def add_groups(self, name: str, groups: Sequence[Sequence[int]], queue: str = "") -> None:
        """Make the groups called `name`: lists of ranks that do not overlap. A collective: all ranks pass the same.

        A name that exists already is left as it is. NCCL runs the operations of a group one after the other; groups of
        the same ranks with another `queue` run beside each other there. gloo needs no second group for that.
        """
        key = f"{name}.{queue}" if queue and self.nccl else name
        if key not in self.groups:
            self.groups[key] = self._make(groups, apart=key != name, name=key)
        self.groups[f"{name}.{queue}" if queue else name] = self.groups[key]

    def _make(self, groups: Sequence[Sequence[int]], apart: bool, name: str) -> dist.ProcessGroup | None:
        """This rank's group of `groups`, under `name` in traces; None where it would be alone."""
        large = [sorted(ranks) for ranks in groups if len(ranks) > 1]
        own = next((ranks for ranks in large if self.rank in ranks), None)
        if large and len(large[0]) == self.layout.world and not apart:
            return self.world
        if large and self.nccl:  # one split of the communicator of all ranks, which each of them takes part in
            group = dist.split_group(self.world, large, timeout=self.timeout, group_desc=name)
            return group if own is not None else None
        # every rank makes every group
        made = [dist.new_group(ranks, timeout=self.timeout, group_desc=name) for ranks in large]
        return made[large.index(own)] if own is not None else None

    def set_timeout(self, seconds: float) -> None:
        """The timeout of all collectives that begin from now on, in every group. Not a collective itself."""
        for group in self._all_groups():
            _set_pg_timeout(timedelta(seconds=seconds), group)

    def _all_groups(self) -> Iterator[dist.ProcessGroup]:
        seen: set[int] = set()
        for group in (self.world, self.control, *self.groups.values()):
            if group is not None and id(group) not in seen:
                seen.add(id(group))
                yield group

    def self_group(self) -> dist.ProcessGroup:
        """A group of this rank only, for code that takes None for all ranks. A collective, the first time."""
        if self.layout.world == 1:
            return self.world
        if "self" not in self.groups:
            self.groups["self"] = dist.new_group([self.rank], timeout=self.timeout, use_local_synchronization=True)
        group = self.groups["self"]
        assert group is not None
        return group

    def all_reduce(self, values: Tensor) -> Tensor:
        """`values` summed in place over all ranks, on the device."""
        dist.all_reduce(values, group=self.world)
        return values

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on any rank. A collective on the control group, of tens of microseconds."""
        counts = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(counts, group=self.control)
        return [count > 0 for count in counts.tolist()]

    def all_gather_text(self, text: str) -> list[str]:
        """`text` of every rank, in rank order. A collective on the control group."""
        own = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)  # names of files may hold surrogates
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.layout.world)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self.control)
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        padded[: len(own)] = torch.tensor(own)
        texts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(texts, padded, group=self.control)
        gathered = zip(texts, lengths, strict=True)
        return [bytes(data[:length].numpy()).decode("utf-8", "surrogatepass") for data, length in gathered]

    @functools.cached_property
    def sharding_mesh(self) -> DeviceMesh:
        """The torch device mesh that `fully_shard` takes: (shards) or, hybrid, (replicas, shards)."""
        return self._device_mesh("replicas", "shards", View.DATA)

    @functools.cached_property
    def expert_sharding_mesh(self) -> DeviceMesh:
        """The same over the ranks with the same experts: (expert_shards) or (expert_replicas, expert_shards).

        A collective where this rank alone holds a shard.
        """
        return self._device_mesh("expert_replicas", "expert_shards", View.EXPERTS)

    def _device_mesh(self, replicas: str, shards: str, view: View) -> DeviceMesh:
        from torch.distributed.device_mesh import DeviceMesh

        layout, own = self.layout, self.layout.position(self.rank, view)
        grid = torch.empty(own.replicas, own.shards, dtype=torch.int64)
        for rank in next(ranks for ranks in layout.groups(*OF_TOKENS) if self.rank in ranks):
            if view is View.DATA or layout.ep_rank(rank) == layout.ep_rank(self.rank):
                position = layout.position(rank, view)
                grid[position.replica, position.shard] = rank
        groups = {name: group for name in (replicas, shards) if (group := self.groups[name]) is not None}
        if own.shards == 1:  # `fully_shard` shards over the last dim
            groups[shards] = self.self_group()
        axes, found = tuple(groups), list(groups.values())
        if len(found) == 1:
            return DeviceMesh.from_group(found[0], self.device.type, grid.flatten(), mesh_dim_names=axes)
        return DeviceMesh.from_group(found, self.device.type, grid, mesh_dim_names=axes)


def start_mesh(
    layout: Layout, device: torch.device, store: dist.Store, rank: int, timeout_seconds: float, backend: str
) -> Mesh:
    """Join the other ranks through `store` and make all groups, over the `backend` nccl or gloo."""
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=layout.world,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if backend == "nccl" else None,  # NCCL connects at once, and makes further groups by splits
    )
    return mesh_over_default_group(layout, device, timeout_seconds)


def mesh_over_default_group(layout: Layout, device: torch.device, timeout_seconds: float) -> Mesh:
    """The mesh over a default group that exists already. Raises ValueError if its size is not the layout's."""
    timeout = timedelta(seconds=timeout_seconds)
    rank, size = dist.get_rank(), dist.get_world_size()
    if size != layout.world:
        raise ValueError(f"the layout ({layout}) is for {layout.world} ranks, but {size} were started")
    world = dist.group.WORLD
    assert world is not None
    nccl = dist.get_backend(world) == "nccl"
    control = dist.new_group(backend="gloo", timeout=timeout) if nccl else world
    mesh = Mesh(layout, rank, device, world, control, timeout, nccl=nccl)
    for axis in AXES:
        mesh.add_groups(axis, layout.groups(axis))
    for name, axes in (("shards", layout.sharding), ("replicas", layout.replication)):
        several = [axis for axis in axes if getattr(layout, axis) > 1]
        if several and (len(several) > 1 or several[0] in axes_of(AxisRole.SEQUENCE)):
            # Beside that of the axis: what is gathered for a layer and what ZeRO prefetches need not wait in one queue
            mesh.add_groups(name, layout.groups(*several))
        else:
            mesh.groups[name] = mesh.groups[several[0]] if several else None
    if layout.ep > 1:
        # Beside all others: tokens on their way to experts wait for nothing that ZeRO prefetches
        mesh.groups["ep"] = mesh._make(layout.expert_groups(), apart=True, name="ep")
        mesh.add_groups("expert_shards", layout.expert_shard_groups())
        if layout.shards > 1:
            mesh.groups["expert_replicas"] = mesh.groups["replicas"]
        else:
            mesh.add_groups("expert_replicas", layout.expert_replica_groups())
    return mesh


def stop_mesh() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def use_threads(threads: int | None, local_world: int) -> int:
    """Give this rank `threads`, or its share of the machine's cores."""
    share = threads_per_rank(threads, local_world)
    torch.set_num_threads(share)
    return share
