"""Building, a step and an evaluation of one rank, rehearsed."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stoker.checkpoint.plan import plan_file
from stoker.conf.schema import Config
from stoker.parallel.batch import Batch
from stoker.parallel.engine import Engine
from stoker.parallel.layout import BatchPlan, Layout, batch_plan
from stoker.parallel.shards import PARAMETER, Shard
from stoker.trainer.parallelize import build_engine
from stoker.trainer.rehearsal.fake_ranks import fake_mesh, fake_tensors
from stoker.trainer.rehearsal.memory import Category, MemoryLog, Peak
from stoker.trainer.rehearsal.stand_ins import stand_ins

ACCUMULATED = 2  # micro-batches without a pipeline that are rehearsed: a third needs no more memory


@dataclass(frozen=True)
class Rehearsal:
    """What one rank needs."""

    rank: int
    kind: str  # cpu | cuda: the device whose kernels it was rehearsed with
    build: Peak  # until the engine is built
    step: Peak  # of forward, backward and update
    evaluation: Peak
    held: Peak  # between two steps
    staged: int  # bytes of a snapshot of this rank, in the memory of the host

    @property
    def peak(self) -> Peak:
        """The largest of them."""
        return max(self.build, self.step, self.evaluation, key=lambda peak: peak.bytes)


def rehearse(config: Config, layout: Layout, rank: int, kind: str = "cpu") -> Rehearsal:
    """What `rank` of `layout` needs, with the kernels of a device of this `kind`, cpu or cuda.

    `config.model.vocab_size` must be set. Raises ValueError as building the engine does, and for an engine that cannot
    run without the other ranks.
    """
    if config.parallel.engine != "fsdp":
        raise ValueError(f"parallel.engine={config.parallel.engine} cannot be rehearsed: parallel.engine=fsdp can")
    plan = _shortened(batch_plan(config, layout), layout)
    with (
        _quiet(),
        fake_mesh(layout, rank) as mesh,
        fake_tensors(),
        stand_ins(kind, config.activation_checkpointing == "selective", lambda _: None),
        MemoryLog() as log,
    ):
        log.phase = "building"
        engine, _ = build_engine(dataclasses.replace(config, compile=False), mesh, plan)
        _name(log, engine)
        build = log.peak()
        log.phase = "between passes"
        rows = _rows(plan, config.seq_len)
        log.assign(Category.ROWS, (field for field in vars(rows).values() if field is not None))
        engine.forward_backward(rows)
        log.assign(Category.GRADIENTS, _gradients(engine))
        result = engine.update(config.optim.lr)
        step, held = log.peak(), log.now()
        log.phase = "evaluation"
        engine.evaluate(rows[: plan.micro_rows])
        evaluation = log.peak()
        staged = plan_file(engine.shards()).file_bytes
        del engine, rows, result
    return Rehearsal(rank, kind, build, step, evaluation, held, staged)


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


def _shortened(plan: BatchPlan, layout: Layout) -> BatchPlan:
    """Fewer micro-batches, with the same peak."""
    if layout.pp > 1 or plan.micro_batches <= ACCUMULATED:
        return plan
    return dataclasses.replace(plan, rank_rows=ACCUMULATED * plan.micro_rows)


def _rows(plan: BatchPlan, seq_len: int) -> Batch:
    def made(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(plan.rank_rows, seq_len, dtype=dtype)

    return Batch(made(torch.int64), made(torch.int64), made(torch.int64), made(torch.int32))


def _gradients(engine: Engine) -> Iterator[torch.Tensor]:
    parameters = (parameter for stage in engine.modules() for parameter in stage.parameters())
    return (parameter.grad for parameter in parameters if parameter.grad is not None)


def _name(log: MemoryLog, engine: Engine) -> None:
    """The categories of what the engine holds all the time."""
    log.assign(Category.COPIES, (parameter for stage in engine.modules() for parameter in stage.parameters()))
    shards: list[Shard] = engine.shards()
    log.assign(Category.OPTIMIZER, (shard.data for shard in shards if shard.kind.startswith("optim.")))
    log.assign(Category.MASTERS, (shard.data for shard in shards if shard.kind == PARAMETER))
