"""Building, a step and an evaluation of one rank, rehearsed."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from stoker.checkpoint.plan import plan_file
from stoker.conf.schema import Config
from stoker.parallel.batch import Batch
from stoker.parallel.engine import Engine
from stoker.parallel.layout import BatchPlan, Layout, batch_plan
from stoker.parallel.model import Part
from stoker.parallel.shards import PARAMETER, Shard
from stoker.trainer.frozen_base import FrozenBase, frozen_names
from stoker.trainer.parallelize import build_engine
from stoker.trainer.rehearsal.extrapolate import NotAlikeError, line, more_layers, more_work
from stoker.trainer.rehearsal.fake_ranks import fake_mesh, fake_tensors
from stoker.trainer.rehearsal.layers import Short, shortened
from stoker.trainer.rehearsal.marks import mark_blocks
from stoker.trainer.rehearsal.memory import Category, Mark, MemoryLog, Peak, Span, highest
from stoker.trainer.rehearsal.stand_ins import stand_ins
from stoker.trainer.rehearsal.work import Work, WorkLog


@dataclass(frozen=True)
class Rehearsal:
    """What one rank needs."""

    rank: int
    kind: str  # cpu | cuda: the device whose kernels it was rehearsed with
    build: Peak  # until the engine is built
    spans: Sequence[Span]  # of forward, backward and update, in order
    evaluation: Peak
    held: Peak  # between two steps
    staged: int  # bytes of a snapshot of this rank, in the memory of the host
    passes: Work  # forward and backward of all micro-batches of a step
    update: Work
    groups: Mapping[str, Sequence[int]]  # the ranks of this one's groups, by the names of messages

    @functools.cached_property
    def step(self) -> Peak:
        """Of forward, backward and update."""
        return highest(self.spans)

    @property
    def peak(self) -> Peak:
        """The largest of them."""
        return max(self.build, self.step, self.evaluation, key=lambda peak: peak.bytes)


@dataclass(frozen=True)
class _Record:
    """Of a rank with the layers that were built."""

    build: list[Span]
    step: list[Span]
    evaluation: list[Span]
    held: Peak
    staged: int
    passes: Work
    update: Work
    groups: Mapping[str, Sequence[int]]


def rehearse(config: Config, layout: Layout, rank: int, kind: str = "cpu", every: bool = False) -> Rehearsal:
    """What `rank` of `layout` needs, with the kernels of a device of this `kind`, cpu or cuda.

    Of layers that are alike a few stand for all, and of a pipeline's micro-batches, unless `every` one is wanted.
    `config.model.vocab_size` must be set. Raises ValueError as building the engine does, and for what cannot run
    without the other ranks, a disk, or the values of tensors.
    """
    if config.parallel.engine != "fsdp":
        raise ValueError(f"parallel.engine={config.parallel.engine} cannot be rehearsed: parallel.engine=fsdp can")
    if config.parallel.offload == "nvme":
        raise ValueError("parallel.offload=nvme cannot be rehearsed, as it writes to a disk: parallel.offload=cpu can")
    plan = batch_plan(config, layout)
    fewer = None if every else _fewer_micro_batches(config, layout, plan)
    if fewer is None:
        found = _few_layers(config, layout, rank, kind, plan, every)
    else:
        less, more = (_few_layers(config, layout, rank, kind, fewer_plan, every) for fewer_plan in fewer.plans)
        found = _more_micro_batches(less, more, fewer.missing)
    return Rehearsal(
        rank,
        kind,
        highest(found.build),
        found.step,
        highest(found.evaluation),
        found.held,
        found.staged,
        found.passes,
        found.update,
        found.groups,
    )


@dataclass(frozen=True)
class _Fewer:
    """Plans with fewer micro-batches than a step has, for two rehearsals of a rank of a pipeline."""

    plans: tuple[BatchPlan, BatchPlan]
    missing: int  # how often the second lacks what it has more than the first


def _fewer_micro_batches(config: Config, layout: Layout, plan: BatchPlan) -> _Fewer | None:
    """As many as fill the pipeline, from where on each adds the same. None where a step has hardly more."""
    if layout.pp == 1:  # `_step` leaves them out
        return None
    first, more = layout.pp + 1, 1
    if config.parallel.schedule == "interleaved":  # it takes whole rounds
        first, more = 2 * layout.pp, layout.pp
    missing = (plan.micro_batches - first) // more - 1
    if missing < 2 or (plan.micro_batches - first) % more:
        return None
    each = plan.micro_rows
    less, same = (BatchPlan(count * each * layout.dp, count * each, each) for count in (first, first + more))
    return _Fewer((less, same), missing)


def _more_micro_batches(less: _Record, more: _Record, missing: int) -> _Record:
    """Continues the line from one record to the other to all micro-batches."""

    def one(which: str) -> list[Span]:
        return [Span(Mark(which), line(highest(getattr(less, which)), highest(getattr(more, which)), missing))]

    held, passes = line(less.held, more.held, missing), more_work(less.passes, more.passes, missing)
    return replace(more, step=one("step"), evaluation=one("evaluation"), held=held, passes=passes)


def _few_layers(config: Config, layout: Layout, rank: int, kind: str, plan: BatchPlan, every: bool) -> _Record:
    """Of all layers, by rehearsing few of them where that will do."""
    short = None if every else shortened(config, layout, rank)
    if short is not None:
        shorter = _record(config, layout, rank, kind, plan, short.shorter)
        with contextlib.suppress(NotAlikeError):
            return _longer(shorter, _record(config, layout, rank, kind, plan, short.longer), short)
    return _record(config, layout, rank, kind, plan)


def _longer(shorter: _Record, longer: _Record, short: Short) -> _Record:
    """Continues the line from one record to the other to all layers. Raises NotAlikeError."""

    def spans(which: str) -> list[Span]:
        pair = getattr(shorter, which), getattr(longer, which)
        return more_layers(*pair, short.period, short.begins, short.missing)

    return _Record(
        spans("build"),
        spans("step"),
        spans("evaluation"),
        line(shorter.held, longer.held, short.missing),
        longer.staged + short.missing * (longer.staged - shorter.staged),
        more_work(shorter.passes, longer.passes, short.missing),
        more_work(shorter.update, longer.update, short.missing),
        longer.groups,
    )


def _record(
    config: Config, layout: Layout, rank: int, kind: str, plan: BatchPlan, parts: Sequence[Part] | None = None
) -> _Record:
    with _quiet(), _without_values(), fake_mesh(layout, rank) as mesh:
        work = WorkLog(mesh)
        selective = config.activation_checkpointing == "selective"
        with fake_tensors(), stand_ins(kind, selective, layout.shards > 1, work.count), MemoryLog(work.see) as log:
            log.phase = "building"
            engine, _ = build_engine(replace(config, compile=False), mesh, plan, parts)
            _name(log, engine)
            log.mark(Mark("built"))
            build = log.spans()
            mark_blocks(engine, log)
            work.take()
            log.phase = "between passes"
            rows = _rows(plan, config.seq_len)
            log.assign(Category.ROWS, (field for field in vars(rows).values() if field is not None))
            passes, update = _step(engine, rows, config, plan, work, log)
            step, held = log.spans(), log.now()
            log.phase = "evaluation"
            engine.evaluate(rows[: plan.micro_rows])
            evaluation = log.spans()
            staged = plan_file(FrozenBase(frozen_names(config), None).saved(engine.shards())).file_bytes
            del engine, rows
        groups: dict[str, Sequence[int]] = {"world": range(layout.world)}
        groups |= {
            name: dist.get_process_group_ranks(group) for name, group in mesh.groups.items() if group is not None
        }
    return _Record(build, step, evaluation, held, staged, passes, update, groups)


def _step(
    engine: Engine, rows: Batch, config: Config, plan: BatchPlan, work: WorkLog, log: MemoryLog
) -> tuple[Work, Work]:
    """The work of a step's passes and of its update.

    Without a pipeline a step of one micro-batch and a step of two are rehearsed: a third needs no more memory, and does
    what the second does.
    """
    whole = plan.micro_batches == 1 or config.parallel.pp > 1
    counts = [plan.micro_batches] if whole else [1, 2]
    passes, update = [], Work()
    for count in counts:
        work.take()
        engine.forward_backward(rows[: count * plan.micro_rows], 0)
        passes.append(work.take())
        log.assign(Category.GRADIENTS, _gradients(engine))
        engine.update(config.optim.lr)
        update = work.take()
    if whole:
        return passes[0], update
    more = passes[1].plus(passes[0], -1)
    return passes[0].plus(more, plan.micro_batches - 1), update


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that building an engine logs for the user of a run."""
    logger = logging.getLogger("stoker")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """Raises ValueError where code inside takes the value of a tensor."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"this start cannot be rehearsed: its step depends on the value of a tensor ({error.func}), as optimizers "
            "without fused kernels and some models do, and fake tensors have none"
        ) from None


def _rows(plan: BatchPlan, seq_len: int) -> Batch:
    def made(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(plan.rank_rows, seq_len, dtype=dtype)

    return Batch(made(torch.int64), made(torch.int64), made(torch.int64), made(torch.int32))


def _gradients(engine: Engine) -> Iterator[torch.Tensor]:
    parameters = (parameter for stage in engine.modules() for parameter in stage.parameters())
    return (parameter.grad for parameter in parameters if parameter.grad is not None)


def _name(log: MemoryLog, engine: Engine) -> None:
    """The categories of what the engine holds all the time."""
    parameters = [parameter for stage in engine.modules() for parameter in stage.parameters()]
    log.assign(Category.COPIES, parameters)
    shards: list[Shard] = engine.shards()
    log.assign(Category.OPTIMIZER, (shard.data for shard in shards if shard.kind.startswith("optim.")))
    log.assign(Category.MASTERS, (shard.data for shard in shards if shard.kind == PARAMETER))
    log.assign(Category.FROZEN, (parameter for parameter in parameters if not parameter.requires_grad))
