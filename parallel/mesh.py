"""Mesh: this rank's place, device and process groups, in one object that is passed and never global."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.layout import AXES, Coordinate, Layout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """The groups of one rank. A group over an axis of size 1 is None: there is nobody to talk to."""

    layout: Layout
    rank: int
    device: torch.device
    world: dist.ProcessGroup  # all ranks, on the device's backend
    control: dist.ProcessGroup  # all ranks, on gloo: small texts between hosts
    axes: dict[str, dist.ProcessGroup | None] = field(default_factory=dict)

    @property
    def at(self) -> Coordinate:
        return self.layout.coordinate(self.rank)

    @property
    def dp_rank(self) -> int:
        return self.layout.dp_rank(self.rank)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one only along `axis`."""
        return self.axes[axis]

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed in place over all ranks, on the device."""
        dist.all_reduce(values, group=self.world)
        return values

    def exchange(self, text: str) -> list[str]:
        """`text` of every rank, in rank order. A collective on the control group."""
        texts: list[str | None] = [None] * self.layout.world
        dist.all_gather_object(texts, text, group=self.control)
        return [gathered or "" for gathered in texts]

    def sharding_mesh(self) -> DeviceMesh:
        """The torch device mesh that `fully_shard` takes: (dp_shard) or, hybrid, (dp_replicate, dp_shard)."""
        from torch.distributed.device_mesh import DeviceMesh

        found = {axis: group for axis, group in self.axes.items() if axis in ("dp_replicate", "dp_shard") and group}
        at = self.at
        ranks = torch.tensor(
            [
                [self.layout.rank(Coordinate(at.pp, replica, shard, at.tp)) for shard in range(self.layout.dp_shard)]
                for replica in range(self.layout.dp_replicate)
            ]
        )
        axes, groups = tuple(found), list(found.values())
        if len(axes) == 1:
            return DeviceMesh.from_group(groups[0], self.device.type, ranks.flatten(), mesh_dim_names=axes)
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=axes)


def pick_device(wanted: str | None, local_rank: int) -> torch.device:
    """The device of the rank with this number on its machine: `wanted` (cpu | cuda), else CUDA where there is one."""
    kind = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def start_mesh(layout: Layout, device: torch.device, store: dist.Store, rank: int, timeout_seconds: float) -> Mesh:
    """Join the other ranks through `store` and make all groups.

    The given timeout is put on every group: torch does not pass the default group's on to new ones.
    """
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=layout.world,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if on_gpu else None,
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
    control = world if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
    axes: dict[str, dist.ProcessGroup | None] = {}
    for axis, axis_size in zip(AXES, layout.sizes(), strict=True):
        axes[axis] = None
        if axis_size == layout.world > 1:
            axes[axis] = world
        elif axis_size > 1:
            for ranks in layout.groups(axis):  # every rank makes every group, in the same order
                group = dist.new_group(ranks, timeout=timeout)
                if rank in ranks:
                    axes[axis] = group
    return Mesh(layout, rank, device, world, control, axes)


def stop_mesh() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def use_threads(threads: int | None, local_world: int) -> int:
    """Give this rank its share of the machine's cores (or `threads`), so that ranks do not fight for them."""
    cores = len(os.sched_getaffinity(0))
    share = threads or max(1, cores // local_world)
    torch.set_num_threads(share)
    return share
