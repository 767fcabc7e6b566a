"""A plan: which ranks need the same, what each class of them needs of memory, and how long a run takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stoker.conf.devices import Device
from stoker.conf.ramp import Ramp, ramp_of, sizes_of
from stoker.conf.schema import Config
from stoker.parallel.layout import BatchPlan, Coordinate, Layout, batch_plan, layout_of
from stoker.trainer.loss_chunk import on_gpus
from stoker.trainer.memory import available_bytes
from stoker.trainer.parallelize import parameters_of, trained_and_frozen
from stoker.trainer.plan.times import HOUR, Counts, Failures, StepTime, Times, failures, step_time, times
from stoker.trainer.rehearsal import Rehearsal, rehearse
from stoker.trainer.report.messages import as_list
from stoker.trainer.report.predicted import Predicted

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
class Asked:
    """What is asked besides memory. `tokens`: of the run, default those of its steps."""

    tokens: float | None = None
    price: float | None = None  # of a device for an hour
    mtbf: float | None = None  # hours between failures of the run


@dataclass(frozen=True)
class Stretch:
    """Steps of one size of `batch.ramp`."""

    first: int  # step
    rows: int  # sequences of a step
    micro_batches: int
    step_seconds: float | None  # None where the device's rates are not known


@dataclass(frozen=True)
class RankClass:
    """Ranks that need the same. `rehearsal` is of the one that needs most: others can hold a shorter share."""

    ranks: Sequence[int]
    stages: str
    rehearsal: Rehearsal


@dataclass(frozen=True)
class Plan:
    """What a start would need. With `batch.ramp` all but `times.seconds` and `sizes` is of its largest steps."""

    config: Config
    layout: Layout
    batch: BatchPlan
    machine: Machine
    parameters: int
    trained: int  # numbers of parameters that are, adapters among them
    frozen: int
    classes: list[RankClass]  # the worst first
    capacity: float | None  # bytes of a device, or of this machine for all ranks; None where unknown
    times: Times | None = None  # None where the device's rates are not known
    failures: Failures | None = None
    price: float | None = None  # of a device for an hour
    sizes: Sequence[Stretch] = ()  # with `batch.ramp`

    @property
    def needed(self) -> float:
        """Bytes, comparable with `capacity`: the worst rank on GPUs, all ranks together on a CPU."""
        if self.machine.kind == "cuda":
            return self.classes[0].rehearsal.peak.bytes * HOLES + RESERVED
        return sum(len(each.ranks) * (each.rehearsal.peak.bytes * MALLOC_HOLES + PROCESS) for each in self.classes)

    @property
    def staged(self) -> float:
        """Bytes of a snapshot of a rank, on average."""
        return sum(len(each.ranks) * each.rehearsal.staged for each in self.classes) / self.layout.world

    @property
    def states(self) -> int:
        """Bytes that all ranks hold between steps."""
        return sum(len(each.ranks) * each.rehearsal.held.bytes for each in self.classes)

    @property
    def flops(self) -> int:
        """Floating-point operations of a step on all ranks, as in `stoker.trainer.rehearsal.Work`."""
        return sum(len(each.ranks) * each.rehearsal.passes.flops for each in self.classes)

    @property
    def cost(self) -> float | None:
        """Of the whole run, in the unit of the price."""
        if self.price is None or self.times is None:
            return None
        kept = self.failures.goodput if self.failures is not None else 1.0
        return self.price * self.layout.world * self.times.seconds / HOUR / kept if kept else None

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else self.needed <= self.capacity


def make_plan(config: Config, world: int, machine: Machine, asked: Asked, ends: bool = False) -> Plan:
    """The plan of `config`, with `model.vocab_size` set, on `world` ranks.

    With `ends` only the first and the last ranks of a pipeline are rehearsed: of the others none holds more, or does.
    Raises ValueError for a model that cannot be parallelized as configured.
    """
    mask = config.data.document_mask
    if mask is None:  # the data are not opened: single files of chats with another packing are taken for texts
        mask = config.data.packing == "best_fit"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, document_mask=mask))
    layout, device = layout_of(config, world), machine.device
    counts = parameters_of(config), *trained_and_frozen(config)
    if machine.kind == "cpu":
        capacity: float | None = available_bytes()
    elif device is None:
        capacity = None
    else:
        capacity = device.memory_gib * GIB
        config = on_gpus(config, layout, capacity, sum(counts[1:]), counts[2])
    ramped, config = config, _with_rows(config, layout, sizes_of(config)[-1])
    batch = batch_plan(config, layout)
    places = sorted({0, layout.pp - 1} if ends else range(layout.pp))
    classes = _classes(config, layout, places, machine.kind)
    plan = Plan(config, layout, batch, machine, *counts, classes, capacity, price=asked.price)
    steps = {config.batch.size: _step(config, layout, classes, device)}
    for rows in sizes_of(ramped)[:-1] if steps[config.batch.size] is not None else ():
        smaller = _with_rows(ramped, layout, rows)
        steps[rows] = _step(smaller, layout, _classes(smaller, layout, places, machine.kind), device)
    if ramped.batch.ramp:
        plan = dataclasses.replace(plan, sizes=_stretches(ramped, batch, layout, steps))
    slowest = steps[config.batch.size]
    if slowest is not None and device is not None:
        tokens = asked.tokens or float(ramp_of(ramped).rows_before(ramped.steps + 1) * config.seq_len)
        seconds = _seconds(
            ramp_of(ramped), tokens / config.seq_len, {rows: one.total for rows, one in steps.items() if one}
        )
        plan = dataclasses.replace(plan, times=times(config, layout, slowest, device, plan.parameters, tokens, seconds))
    if asked.mtbf is not None:
        plan = dataclasses.replace(plan, failures=failures(asked.mtbf * HOUR, plan.staged))
    return plan


def predicted_of(plan: Plan) -> Predicted:
    """The figures of `plan`."""
    worst, device, times = plan.classes[0], plan.machine.device, plan.times
    peak = worst.rehearsal.peak.bytes
    most = peak * HOLES if plan.machine.kind == "cuda" else peak * MALLOC_HOLES + PROCESS
    figures: dict[str, float] = {}
    if times is not None and device is not None:
        figures = {"step_seconds": times.step.total, "tokens_per_second": times.tokens_per_second, "mfu": times.mfu}
        figures["tflops"] = times.mfu * (device.peak(plan.config.precision) or 0.0)
    name = None if device is None else device.name
    first = next(each.rehearsal for each in plan.classes if 0 in each.ranks)
    messages = as_list(first.passes.plus(first.update).messages)
    return Predicted(
        plan.machine.kind,
        str(plan.layout),
        plan.layout.world,
        name,
        worst.ranks[0],
        peak,
        round(most),
        **figures,
        messages=messages,
    )


def _with_rows(config: Config, layout: Layout, rows: int) -> Config:
    """`config` with steps of `rows` sequences, in the micro-batches that it has."""
    if not config.batch.ramp:
        return config
    batch = dataclasses.replace(config.batch, size=rows, ramp=[], micro_size=batch_plan(config, layout).micro_rows)
    return dataclasses.replace(config, batch=batch)


def _stretches(config: Config, batch: BatchPlan, layout: Layout, steps: Mapping[int, StepTime | None]) -> list[Stretch]:
    found = []
    for first, _, rows in ramp_of(config).starts:
        step = steps.get(rows)
        micro_batches = rows // layout.dp // batch.micro_rows
        found.append(Stretch(first, rows, micro_batches, None if step is None else step.total))
    return found


def _seconds(ramp: Ramp, rows: float, steps: Mapping[int, float]) -> float:
    """For so many sequences, in steps that take `steps` by their size."""
    ends = [before for _, before, _ in ramp.starts[1:]] + [math.inf]
    return sum(
        max(0.0, min(rows, end) - before) / size * steps[size]
        for (_, before, size), end in zip(ramp.starts, ends, strict=True)
    )


def _step(config: Config, layout: Layout, classes: Sequence[RankClass], device: Device | None) -> StepTime | None:
    """Of the slowest class of ranks; None where the device's rates are not known."""
    if device is None:
        return None
    found = []
    for each in classes:
        rehearsed = each.rehearsal
        counts = Counts(rehearsed.passes, rehearsed.update, rehearsed.groups)
        step = step_time(config, layout, counts, device, batch_plan(config, layout))
        if step is None:
            return None
        found.append(step)
    return max(found, key=lambda step: step.total)


def _classes(config: Config, layout: Layout, places: Sequence[int], kind: str) -> list[RankClass]:
    """The ranks of these places in the pipeline, those that need most first."""
    found = [_class(config, layout, pp, kind) for pp in places]
    return sorted(found, key=lambda each: each.rehearsal.peak.bytes, reverse=True)


def _class(config: Config, layout: Layout, pp: int, kind: str) -> RankClass:
    """The ranks of a place in the pipeline. The first of them have the largest share of what does not divide."""
    first = layout.rank(Coordinate(pp, 0, 0, 0, 0))
    ranks = range(first, first + layout.world // layout.pp)
    numbers = range(pp, layout.pp * config.parallel.stages_per_rank, layout.pp)
    return RankClass(ranks, ", ".join(map(str, numbers)), rehearse(config, layout, first, kind))
