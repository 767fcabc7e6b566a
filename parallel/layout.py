"""Layout: the sizes of the mesh axes and what follows from them, as pure arithmetic; last, a rank's share of cores."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass

from stoker.conf.ramp import unit_rows
from stoker.conf.schema import Config

AXES = ("pp", "dp_replicate", "dp_shard", "tp")  # outermost first: tp ranks are adjacent


@dataclass(frozen=True)
class Coordinate:
    """A rank's coordinate on each axis."""

    pp: int
    dp_replicate: int
    dp_shard: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """The sizes of the axes, and the ZeRO stage and engine that run on them."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 0
    engine: str = "fsdp"

    @property
    def dp(self) -> int:
        """Data-parallel degree: how many different sets of rows a step reads."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        return self.dp * self.tp * self.pp

    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    def coordinate(self, rank: int) -> Coordinate:
        """Place of `rank` in the grid, row-major over AXES."""
        assert 0 <= rank < self.world
        places = []
        for size in reversed(self.sizes()):
            rank, place = divmod(rank, size)
            places.append(place)
        return Coordinate(*reversed(places))

    def rank(self, at: Coordinate) -> int:
        """The inverse of `coordinate`."""
        rank = 0
        for axis, size in zip(AXES, self.sizes(), strict=True):
            rank = rank * size + getattr(at, axis)
        return rank

    def dp_rank(self, rank: int) -> int:
        """Which of the `dp` sets of rows `rank` reads."""
        at = self.coordinate(rank)
        return at.dp_replicate * self.dp_shard + at.dp_shard

    def stride(self, axis: str) -> int:
        """Distance in rank numbers between adjacent ranks on `axis`."""
        return math.prod(self.sizes()[AXES.index(axis) + 1 :])

    def groups(self, *axes: str) -> list[list[int]]:
        """The groups of ranks that differ only along `axes`, each in rank order, every rank in exactly one."""
        firsts, members = [0], [0]
        for axis, size in zip(AXES, self.sizes(), strict=True):
            steps = [place * self.stride(axis) for place in range(size)]
            if axis in axes:
                members = [member + step for member in members for step in steps]
            else:
                firsts = [first + step for first in firsts for step in steps]
        return [[first + member for member in members] for first in firsts]

    def __str__(self) -> str:
        axes = " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1)
        return f"{axes or '1 rank'}, ZeRO {self.zero}, {self.engine}"


def layout_of(config: Config, world: int) -> Layout:
    """The layout of `config` on `world` ranks.

    Raises ValueError when the axes do not multiply to `world`; `stoker.trainer.validate` reports that in more detail.
    """
    wanted = config.parallel
    dp, rest = divmod(world, wanted.tp * wanted.pp)
    if rest or not dp:
        raise ValueError(f"{world} ranks do not divide into tp {wanted.tp} x pp {wanted.pp}")
    replicas = dp if wanted.zero == 0 else (wanted.dp_replicate or 1)
    if wanted.dp_replicate is not None and wanted.dp_replicate != replicas:
        raise ValueError(f"ZeRO 0 keeps a replica on each of the {dp} data-parallel ranks, not {wanted.dp_replicate}")
    if dp % replicas:
        raise ValueError(f"{dp} data-parallel ranks do not divide into {replicas} replicas")
    return Layout(replicas, dp // replicas, wanted.tp, wanted.pp, wanted.zero, wanted.engine)


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch is split: rows of each data-parallel rank, cut into micro-batches."""

    rows: int  # the global batch
    rank_rows: int
    micro_rows: int

    @property
    def micro_batches(self) -> int:
        """Accumulation steps."""
        return self.rank_rows // self.micro_rows


def batch_plan(config: Config, layout: Layout) -> BatchPlan:
    """The split of `batch.size` over `layout`; with `batch.ramp` micro-batches divide every step's rows.

    Raises ValueError when they do not divide.
    """
    rows = config.batch.size
    unit, rest = divmod(unit_rows(config), layout.dp)
    if rest or not unit:
        of = f"batch.size={rows}" if not config.batch.ramp else f"batch.ramp with batch.size={rows}"
        raise ValueError(f"{of} does not divide over {layout.dp} data-parallel ranks")
    micro = config.batch.micro_size or next(n for n in range(min(8, unit), 0, -1) if unit % n == 0)
    if micro < 1 or unit % micro:
        raise ValueError(f"{unit} rows per rank do not divide into micro-batches of {micro}")
    return BatchPlan(rows, rows // layout.dp, micro)


def fit(config: Config, world: int) -> Config:
    """`config` for another number of ranks than it was made for: tp and pp stay, the data-parallel degree follows.

    Where replicas or micro-batches no longer divide, the largest smaller number that does replaces them. What still
    does not fit (tp x pp, batch.size) is left for `stoker.trainer.validate`. None of this changes the maths.
    """
    dp, rest = divmod(world, config.parallel.tp * config.parallel.pp)
    if rest or not dp or unit_rows(config) % dp:
        return config
    replicas, micro, rank_rows = config.parallel.dp_replicate, config.batch.micro_size, unit_rows(config) // dp
    if replicas is not None:
        replicas = dp if config.parallel.zero == 0 else _largest_divisor(dp, replicas)
    if micro is not None:
        micro = _largest_divisor(rank_rows, micro)
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, dp_replicate=replicas),
        batch=dataclasses.replace(config.batch, micro_size=micro),
    )


def _largest_divisor(number: int, most: int) -> int:
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def threads_per_rank(threads: int | None, local_world: int) -> int:
    """`threads`, else a rank's share of the cores that this process may use, so that ranks do not compete for them."""
    return threads or max(1, len(os.sched_getaffinity(0)) // local_world)
