"""A rank without others: a process group that sends nothing, and tensors that hold nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from stoker.parallel.layout import Layout
from stoker.parallel.mesh import Mesh, mesh_over_default_group, stop_mesh

TIMEOUT_SECONDS = 60.0  # of groups in which nothing waits


@contextlib.contextmanager
def fake_mesh(layout: Layout, rank: int) -> Iterator[Mesh]:
    """The mesh of `rank`, on the CPU. Every collective returns at once, with what its output held before.

    Raises ValueError in a process that has a process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # it registers the backend

    if dist.is_initialized():
        raise ValueError("this process already has a process group, and a rehearsal makes its own")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    try:
        mesh = mesh_over_default_group(layout, torch.device("cpu"), TIMEOUT_SECONDS)
        if layout.shards > 1:
            _ = mesh.sharding_mesh  # of real tensors: made before there are fake ones only
            _ = mesh.expert_sharding_mesh if layout.ep > 1 else None
        with _without_votes() if layout.pp > 1 else contextlib.nullcontext():
            yield mesh
    finally:
        stop_mesh()


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors that are made inside have shapes and storages of a size, but no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextlib.contextmanager
def _without_votes() -> Iterator[None]:
    """torch's stages vote at the first step whether their shapes are known, which takes the value of a message."""
    from torch.distributed.pipelining.schedules import InferenceMode, _PipelineSchedule

    # Since torch 2.15 the vote is a part of connecting the ranks.
    votes = next(
        name for name in ("_initialize_pipeline_distributed_state", "_warmup_p2p") if hasattr(_PipelineSchedule, name)
    )

    def known(_: Any, stages: Sequence[Any], *__: Any, **___: Any) -> Any:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC
        return InferenceMode.STATIC

    before = getattr(_PipelineSchedule, votes)
    setattr(_PipelineSchedule, votes, known)
    try:
        yield
    finally:
        setattr(_PipelineSchedule, votes, before)
