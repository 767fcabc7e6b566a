"""A plan: which ranks need the same, and what each class of them needs of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from stoker.conf.devices import Device
from stoker.conf.schema import Config
from stoker.parallel.layout import BatchPlan, Coordinate, Layout, batch_plan, layout_of
from stoker.trainer.memory import available_bytes
from stoker.trainer.parallelize import parameters_of
from stoker.trainer.rehearsal import Rehearsal, rehearse

GIB = 2**30
RESERVED = 1.5 * GIB  # of a GPU: the context, the libraries' workspaces and NCCL's buffers
HOLES = 1.05  # what the allocator of GPUs takes over what is live
MALLOC_HOLES = 1.4  # what malloc does, as a run sets it: it keeps freed blocks. Measured: 1.07 to 1.37
PROCESS = 0.4 * GIB  # a rank on a CPU before it has any tensor


@dataclass(frozen=True)
class Machine:
    """What the ranks compute on: CPUs, or GPUs, of which None are of a known kind."""

    kind: str  # cpu | cuda
    device: Device | None


@dataclass(frozen=True)
class RankClass:
    """Ranks that need the same. `rehearsal` is of the one that needs most: others can hold a shorter share."""

    ranks: Sequence[int]
    stages: str
    rehearsal: Rehearsal


@dataclass(frozen=True)
class Plan:
    """What a start would need."""

    config: Config
    layout: Layout
    batch: BatchPlan
    machine: Machine
    parameters: int
    classes: list[RankClass]  # the worst first
    capacity: float | None  # bytes of a device, or of this machine for all ranks; None where unknown

    @property
    def needed(self) -> float:
        """Bytes, comparable with `capacity`: the worst rank on GPUs, all ranks together on a CPU."""
        if self.machine.kind == "cuda":
            return self.classes[0].rehearsal.peak.bytes * HOLES + RESERVED
        return sum(len(each.ranks) * (each.rehearsal.peak.bytes * MALLOC_HOLES + PROCESS) for each in self.classes)

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else self.needed <= self.capacity


def make_plan(config: Config, world: int, machine: Machine) -> Plan:
    """The plan of `config`, with `model.vocab_size` set, on `world` ranks.

    Raises ValueError for a model that cannot be parallelized as configured.
    """
    mask = config.data.document_mask
    if mask is None:  # the data are not opened: single files of chats with another packing are taken for texts
        mask = config.data.packing == "best_fit"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, document_mask=mask))
    layout = layout_of(config, world)
    classes = [_class(config, layout, pp, machine.kind) for pp in range(layout.pp)]
    classes.sort(key=lambda each: each.rehearsal.peak.bytes, reverse=True)
    if machine.kind == "cpu":
        capacity: float | None = available_bytes()
    else:
        capacity = machine.device.memory_gib * GIB if machine.device is not None else None
    parameters = parameters_of(config)
    return Plan(config, layout, batch_plan(config, layout), machine, parameters, classes, capacity)


def _class(config: Config, layout: Layout, pp: int, kind: str) -> RankClass:
    """The ranks of a place in the pipeline. The first of them have the largest share of what does not divide."""
    first = layout.rank(Coordinate(pp, 0, 0, 0))
    ranks = range(first, first + layout.dp * layout.tp)
    numbers = range(pp, layout.pp * config.parallel.stages_per_rank, layout.pp)
    return RankClass(ranks, ", ".join(map(str, numbers)), rehearse(config, layout, first, kind))
