"""Layout: the sizes of the mesh axes and what follows from them, as pure arithmetic; last, a rank's share of cores."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from stoker.conf.ramp import unit_rows
from stoker.conf.schema import Config


class AxisRole(enum.StrEnum):
    """What the ranks along an axis share. Groups that reduce, and the rows of a rank, follow from it."""

    STAGE = "stage"  # one model: each rank has some of its layers
    REPLICA = "replica"  # nothing: each rank has other rows, and a copy of what ZeRO shards
    SHARD = "shard"  # the copy that ZeRO shards; each rank has other rows
    SEQUENCE = "sequence"  # their rows, of which each rank has some tokens, and what ZeRO shards
    TENSOR = "tensor"  # their rows, and every layer


# Outermost first: tp ranks are adjacent.
ROLES = {
    "pp": AxisRole.STAGE,
    "dp_replicate": AxisRole.REPLICA,
    "dp_shard": AxisRole.SHARD,
    "cp": AxisRole.SEQUENCE,
    "tp": AxisRole.TENSOR,
}
AXES = tuple(ROLES)


def axes_of(*roles: AxisRole) -> tuple[str, ...]:
    """The axes with one of these roles, outermost first."""
    return tuple(axis for axis, role in ROLES.items() if role in roles)


OF_ROWS = axes_of(AxisRole.REPLICA, AxisRole.SHARD)  # along which ranks read different rows
OF_ONE_MODEL = axes_of(AxisRole.STAGE, AxisRole.SEQUENCE, AxisRole.TENSOR)  # along which they read the same
OF_TOKENS = axes_of(AxisRole.REPLICA, AxisRole.SHARD, AxisRole.SEQUENCE)  # along which gradients are summed


@dataclass(frozen=True)
class Coordinate:
    """A rank's coordinate on each axis."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int


class View(enum.StrEnum):
    """Which ranks hold a parameter's copies and shards, and sum its gradient."""

    DATA = "data"  # all that read different tokens
    EXPERTS = "experts"  # of those, the ones with the same experts


@dataclass(frozen=True)
class Position:
    """A rank's part of a parameter, among the ranks of its view."""

    shard: int
    shards: int
    replica: int  # number among the ranks that hold the same shard
    replicas: int


@dataclass(frozen=True)
class Layout:
    """The sizes of the axes, the expert-parallel degree, and the ZeRO stage and engine that run on them.

    The ranks that read different tokens stand in a row, by replica, shard and place on the sequence axis. Each `ep`
    neighbours are an expert group: together they hold every expert once, and each of them all else as without experts.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 0
    engine: str = "fsdp"
    cp: int = 1
    ep: int = 1

    @property
    def dp(self) -> int:
        """Data-parallel degree: how many different sets of rows a step reads."""
        return self.size(OF_ROWS)

    @property
    def world(self) -> int:
        return self.size(AXES)

    @property
    def sharding(self) -> tuple[str, ...]:
        """The axes over which ZeRO shards."""
        return axes_of(AxisRole.SHARD, AxisRole.SEQUENCE) if self.zero else axes_of(AxisRole.SHARD)

    @property
    def replication(self) -> tuple[str, ...]:
        """The axes whose ranks hold the same shards and sum their gradients."""
        return tuple(axis for axis in OF_TOKENS if axis not in self.sharding)

    @property
    def shards(self) -> int:
        """Into how many parts ZeRO shards what it shards."""
        return self.size(self.sharding)

    @property
    def replicas(self) -> int:
        """How many copies of the shards there are."""
        return self.size(self.replication)

    @property
    def most_ep(self) -> int:
        """The number that `ep` divides: an expert group lies within the ranks that shard one copy, if any do."""
        return self.shards if self.shards > 1 else self.replicas

    def position(self, rank: int, view: View) -> Position:
        """Where `rank` stands among the ranks that hold the parameters of `view`."""
        shard, replica = self.place(rank, self.sharding), self.place(rank, self.replication)
        if view is View.DATA:
            return Position(shard, self.shards, replica, self.replicas)
        if self.shards > 1:
            return Position(shard // self.ep, self.shards // self.ep, replica, self.replicas)
        return Position(0, 1, replica // self.ep, self.replicas // self.ep)

    def ep_rank(self, rank: int) -> int:
        """The number of `rank` in its expert group: which of the `ep` equal parts of the experts it holds."""
        return self.place(rank, OF_TOKENS) % self.ep

    def expert_groups(self) -> list[list[int]]:
        """The ranks that hold every expert once, in the order of their parts."""
        rows = self.groups(*OF_TOKENS)
        return [row[start : start + self.ep] for row in rows for start in range(0, len(row), self.ep)]

    def expert_shard_groups(self) -> list[list[int]]:
        """The ranks over which ZeRO shards the same experts."""
        return self._alike(self.groups(*self.sharding)) if self.shards > 1 else []

    def expert_replica_groups(self) -> list[list[int]]:
        """The ranks that hold the same shards of the same experts, and sum their gradients."""
        return self.groups(*self.replication) if self.shards > 1 else self._alike(self.groups(*self.replication))

    def _alike(self, rows: list[list[int]]) -> list[list[int]]:
        """Of every row of ranks those with the same place in their expert groups."""
        return [row[place :: self.ep] for row in rows for place in range(self.ep)]

    def size(self, axes: Sequence[str]) -> int:
        """Ranks of a group along `axes`."""
        return math.prod(getattr(self, axis) for axis in axes)

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

    def place(self, rank: int, axes: Sequence[str]) -> int:
        """The number of `rank` in its group along `axes`, which are in the order of AXES."""
        at, found = self.coordinate(rank), 0
        for axis in axes:
            found = found * getattr(self, axis) + getattr(at, axis)
        return found

    def dp_rank(self, rank: int) -> int:
        """Which of the `dp` sets of rows `rank` reads."""
        return self.place(rank, OF_ROWS)

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
        axes += f", ep {self.ep}" if self.ep > 1 else ""
        return f"{axes or '1 rank'}, ZeRO {self.zero}, {self.engine}"


def layout_of(config: Config, world: int) -> Layout:
    """The layout of `config` on `world` ranks.

    Raises ValueError when the axes do not multiply to `world`; `stoker.trainer.validate` reports that in more detail.
    """
    wanted = config.parallel
    dp, rest = divmod(world, wanted.tp * wanted.pp * wanted.cp)
    if rest or not dp:
        raise ValueError(f"{world} ranks do not divide into tp {wanted.tp} x pp {wanted.pp} x cp {wanted.cp}")
    replicas = dp if wanted.zero == 0 else (wanted.dp_replicate or 1)
    if wanted.dp_replicate is not None and wanted.dp_replicate != replicas:
        raise ValueError(f"ZeRO 0 keeps a replica on each of the {dp} data-parallel ranks, not {wanted.dp_replicate}")
    if dp % replicas:
        raise ValueError(f"{dp} data-parallel ranks do not divide into {replicas} replicas")
    layout = Layout(replicas, dp // replicas, wanted.tp, wanted.pp, wanted.zero, wanted.engine, wanted.cp, wanted.ep)
    if wanted.ep < 1 or layout.most_ep % wanted.ep:
        raise ValueError(f"ep {wanted.ep} does not divide the {layout.most_ep} ranks that hold experts")
    return layout


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

    Where cp, ep, replicas or micro-batches no longer divide, the largest smaller number that does replaces them; a
    larger cp where there are more ranks than rows for them. What still does not fit (tp x pp, batch.size) is left for
    `stoker.trainer.validate`. None of this changes the maths.
    """
    blocks, rest = divmod(world, config.parallel.tp * config.parallel.pp)
    cp = None if rest or not blocks else _fitting_cp(config, blocks)
    if cp is None:
        return config
    dp = blocks // cp
    replicas, micro, rank_rows = config.parallel.dp_replicate, config.batch.micro_size, unit_rows(config) // dp
    if replicas is not None:
        replicas = dp if config.parallel.zero == 0 else _largest_divisor(dp, replicas)
    if micro is not None:
        micro = _largest_divisor(rank_rows, micro)
    shards = dp * cp if config.parallel.zero == 0 else dp // (replicas or 1) * cp
    ep = math.gcd(config.parallel.ep, shards if shards > 1 else dp * cp)  # a divisor of it divides the experts too
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, dp_replicate=replicas, cp=cp, ep=ep),
        batch=dataclasses.replace(config.batch, micro_size=micro),
    )


def _fitting_cp(config: Config, blocks: int) -> int | None:
    """The cp nearest to the config's, smaller first, that leaves of `blocks` ranks a dp that divides the rows."""
    wanted = config.parallel.cp

    def fits(cp: int) -> bool:
        return blocks % cp == 0 and unit_rows(config) % (blocks // cp) == 0 and config.seq_len % cp == 0

    if wanted == 1:  # a run without context parallelism gets none
        return 1 if fits(1) else None
    smaller = [cp for cp in range(wanted, 0, -1) if wanted % cp == 0]
    larger = range(2 * wanted, blocks + 1, wanted)
    return next((cp for cp in (*smaller, *larger) if fits(cp)), None)


def _largest_divisor(number: int, most: int) -> int:
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def threads_per_rank(threads: int | None, local_world: int) -> int:
    """`threads`, else a rank's share of the cores that this process may use, so that ranks do not compete for them."""
    return threads or max(1, len(os.sched_getaffinity(0)) // local_world)
