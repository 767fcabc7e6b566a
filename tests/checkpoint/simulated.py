"""Ranks simulated in one process: each is a `Checkpoints` and a list of shards; their writers are threads anyway."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.checkpoint import Checkpoints, Remote, SaveReport, resume
from stoker.parallel.shards import Chunk, Shard, whole

Tensors = dict[tuple[str, str], Tensor]  # by (kind, name)
Ranks = list[list[Shard]]  # the shards of each rank
STARTED: list[Checkpoints] = []  # by the test that runs; conftest.py ends their threads


@dataclass(frozen=True)
class Grid:
    """A layout: matrices are cut into rows x columns; that is held `replicas` times."""

    rows: int = 1
    columns: int = 1
    replicas: int = 1

    @property
    def world(self) -> int:
        return self.rows * self.columns * self.replicas


def cut(tensors: Tensors, grid: Grid) -> Ranks:
    """Shards of copies of `tensors`. Vectors are cut into rows only, scalars not at all: those are replicated more."""
    ranks: Ranks = []
    for rank in range(grid.world):
        replica, place = divmod(rank, grid.rows * grid.columns)
        row, column = divmod(place, grid.columns)
        shards = []
        for (kind, name), tensor in tensors.items():
            offset, size = [0] * tensor.ndim, list(tensor.shape)
            copy, copies = replica, grid.replicas
            axes = ((0, row, grid.rows), (1, column, grid.columns))
            for dim, at, parts in axes:
                if dim < tensor.ndim:
                    start, stop = tensor.shape[dim] * at // parts, tensor.shape[dim] * (at + 1) // parts
                    offset[dim], size[dim] = start, stop - start
                else:
                    copy, copies = copy * parts + at, copies * parts
            chunk = Chunk(tuple(offset), tuple(size))
            index = tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))
            shards.append(Shard(name, kind, tuple(tensor.shape), chunk, tensor[index].clone(), copy, copies))
        ranks.append(shards)
    return ranks


def start(directory: Path, world: int, *, attempt: int = 1, keep: int = 3, **options: Any) -> list[Checkpoints]:
    options = {"timeout_seconds": 20.0} | options
    writers = [Checkpoints(directory, rank=r, world=world, attempt=attempt, keep=keep, **options) for r in range(world)]
    STARTED.extend(writers)
    return writers


def begin(writers: Sequence[Checkpoints], step: int, ranks: Ranks, state: dict[str, Any] | None = None) -> None:
    for writer, shards in zip(writers, ranks, strict=True):
        writer.save(step, shards, {"step": step} if state is None else state)


def end(writers: Sequence[Checkpoints]) -> list[list[SaveReport]]:
    """What each rank reports once nothing is in flight."""
    for writer in writers:
        writer.wait()
    return [writer.finished() for writer in writers]


def save(writers: Sequence[Checkpoints], step: int, ranks: Ranks, state: dict[str, Any] | None = None) -> None:
    """A save that must work."""
    begin(writers, step, ranks, state)
    for reports in end(writers):
        for report in reports:
            assert report.error is None, report.error


def saved(directory: Path, tensors: Tensors, *steps: int, grid: Grid | None = None) -> None:
    """Commit `tensors` as the checkpoints of `steps`."""
    grid = grid or Grid(rows=2)
    writers = start(directory, grid.world, keep=100)
    for step in steps:
        save(writers, step, cut(tensors, grid))


def exchange(world: int) -> Callable[[int], Callable[[str], list[str]]]:
    """The `exchange` of each of `world` threads."""
    barrier, texts = threading.Barrier(world), [""] * world

    def of_rank(rank: int) -> Callable[[str], list[str]]:
        def gather(text: str) -> list[str]:
            texts[rank] = text
            barrier.wait(20)
            everything = list(texts)
            barrier.wait(20)
            return everything

        return gather

    return of_rank


def resume_all(directory: Path, ranks: Ranks, remote: Remote | None = None) -> list[Any]:
    """For each rank what its `resume` returned or raised."""
    of_rank = exchange(len(ranks))

    def one(rank: int) -> Any:
        try:
            return resume(directory, ranks[rank], of_rank(rank), rank, remote)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, range(len(ranks))))


def blank(ranks: Ranks) -> Ranks:
    """Every element set to a value that no test tensor has everywhere."""
    for shards in ranks:
        for shard in shards:
            shard.data.fill_(1)
    return ranks


def same_bits(a: Tensor, b: Tensor) -> bool:
    def raw(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def holds(ranks: Ranks, tensors: Tensors) -> bool:
    """Are the shards' data the very bits of their parts of `tensors`?"""
    return all(
        same_bits(shard.data, tensors[shard.kind, shard.name][shard.chunk.within(whole(shard.shape))])
        for shards in ranks
        for shard in shards
    )


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits of `dtype`: any value, NaNs too."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(tuple(shape))


def small_model(seed: int = 0) -> Tensors:
    """A few tensors of every kind, several blocks of 1024 bytes long."""
    shapes = {"embedding": (37, 16), "layer.0": (24, 40), "norm": (16,), "gain": (), "nothing": (0, 5)}
    tensors = {
        ("param", name): random_tensor(shape, torch.float32, seed + i) for i, (name, shape) in enumerate(shapes.items())
    }
    tensors["optim.exp_avg", "layer.0"] = random_tensor((24, 40), torch.bfloat16, seed + 10)
    tensors["optim.step", "layer.0"] = torch.tensor(float(seed))
    return tensors
