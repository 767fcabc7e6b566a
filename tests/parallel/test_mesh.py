from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stoker.parallel.layout import AXES, Layout
from stoker.parallel.mesh import Mesh, mesh_over_default_group, start_mesh
from tests import world

TEXTS = ["", "a name with a surrogate \udcff, \N{SNOWMAN} and \0", "x" * 100_000]


def exchanged() -> list[list[str]]:
    """What the ranks of a mesh gather when each gives another of the texts, with a pickle of which no byte is read."""
    mesh = mesh_over_default_group(Layout(dist.get_world_size()), torch.device("cpu"), 60.0)
    unpickler = dist.distributed_c10d._unpickler

    def refuse(*_: object) -> None:
        raise AssertionError("something is unpickled")

    dist.distributed_c10d._unpickler = refuse
    try:
        return [mesh.all_gather_text(TEXTS[(mesh.rank + shift) % len(TEXTS)]) for shift in range(3)]
    finally:
        dist.distributed_c10d._unpickler = unpickler


def test_texts_of_all_lengths_are_gathered_as_bytes() -> None:
    expected = [[TEXTS[(rank + shift) % 3] for rank in range(2)] for shift in range(3)]
    assert world.run(exchanged, 2) == [expected, expected]


class FakeNccl:
    """torch.distributed with NCCL's groups, as names; records how each was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
        self.started: dict[str, Any] = {}
        self.splits: list[list[list[int]]] = []
        self.named: list[str] = []
        self.rank = rank
        monkeypatch.setattr(dist, "init_process_group", lambda backend, **o: self.started.update(o, backend=backend))
        monkeypatch.setattr(dist, "get_rank", lambda group=None: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: world)
        monkeypatch.setattr(dist, "get_backend", lambda group=None: self.started["backend"])
        monkeypatch.setattr(dist.distributed_c10d._world, "_default_pg", "world", raising=False)
        monkeypatch.setattr(dist, "split_group", self.split)
        monkeypatch.setattr(dist, "new_group", self.new)

    def split(self, parent: str, ranks: list[list[int]], timeout: timedelta, group_desc: str) -> str | None:
        assert parent == "world" and timeout == timedelta(seconds=60)
        self.named.append(group_desc)
        self.splits.append(ranks)
        return f"split {len(self.splits)}" if any(self.rank in group for group in ranks) else None

    def new(self, ranks: Any = None, backend: str | None = None, timeout: Any = None) -> str:
        assert (ranks, backend) == (None, "gloo"), "a group made for itself costs every rank a barrier"
        return "control"


def mesh_of(monkeypatch: pytest.MonkeyPatch, layout: Layout, rank: int) -> tuple[Mesh, FakeNccl]:
    nccl = FakeNccl(monkeypatch, rank, layout.world)
    mesh = start_mesh(layout, torch.device("cuda", rank), dist.HashStore(), rank, 60.0, "nccl")
    return mesh, nccl


def test_over_nccl_all_groups_of_an_axis_come_of_one_split(monkeypatch) -> None:
    layout = Layout(2, 2, 2, 2, 3)
    mesh, nccl = mesh_of(monkeypatch, layout, 5)
    assert nccl.started["device_id"] == torch.device("cuda", 5), "it connects at once"
    axes = [axis for axis in AXES if axis != "cp"]  # of one rank here
    assert nccl.splits == [layout.groups(axis) for axis in axes]
    assert nccl.named == axes, "traces and flight records name the axis"
    assert mesh.control == "control" and mesh.group("tp") == "split 4"
    mesh.add_groups("ends", [[ranks[0], ranks[-1]] for ranks in layout.groups("pp")])
    assert mesh.group("ends") == "split 5"
    mesh.add_groups("ends", [[0, 1]])
    assert len(nccl.splits) == 5, "a name that exists is left as it is"


def test_ranks_that_are_in_no_group_take_part_in_its_split(monkeypatch) -> None:
    mesh, nccl = mesh_of(monkeypatch, Layout(pp=3), 1)
    mesh.add_groups("ends", [[0, 2]])
    assert nccl.splits[-1] == [[0, 2]] and mesh.group("ends") is None


def test_each_direction_of_a_pipeline_has_a_communicator_over_nccl_and_shares_one_over_gloo(monkeypatch) -> None:
    mesh, nccl = mesh_of(monkeypatch, Layout(pp=2), 0)
    assert mesh.group("pp") == "world" and nccl.splits == []
    for way in ("forward", "backward"):
        mesh.add_groups("pp", [[0, 1]], queue=way)
    assert [mesh.group(f"pp.{way}") for way in ("forward", "backward")] == ["split 1", "split 2"]


def shared() -> bool:
    mesh = mesh_over_default_group(Layout(pp=2), torch.device("cpu"), 60.0)
    for way in ("forward", "backward"):
        mesh.add_groups("pp", [[0, 1]], queue=way)
    return mesh.group("pp.forward") is mesh.group("pp.backward") is mesh.group("pp") is mesh.world


def test_over_gloo_directions_share_the_group() -> None:
    assert world.run(shared, 2) == [True, True]
