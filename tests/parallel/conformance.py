"""Results of every engine on a rank, to be compared with one process in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch

from stoker.conf.schema import BatchConfig, Config, OptimConfig, ParallelConfig
from stoker.parallel.batch import IGNORE_INDEX
from stoker.parallel.engine import Engine
from stoker.parallel.layout import BatchPlan, Layout, batch_plan, layout_of
from stoker.parallel.mesh import Mesh, mesh_over_default_group
from stoker.parallel.shards import PARAMETER, Shard
from stoker.parallel.update import ControlFlag, StepFlags
from stoker.trainer.parallelize import cut
from tests.parallel.reference import Trace, global_rows, one_process, small_config
from tests.parallel.toy_engine import ToyEngine

STEPS = 10
SGD = OptimConfig(name="sgd", lr=0.5, momentum=0.9)

BUILDERS: dict[str, Callable[[Config, Mesh, BatchPlan], Engine]] = {"fsdp": cut, "toy": ToyEngine}


def train(
    config: Config, engine_name: str = "fsdp", steps: int = STEPS, poison: int | None = None
) -> tuple[Trace, list[Shard]]:
    """On a rank: train and return the trace and this rank's shards."""
    engine, mesh = build(config, engine_name)
    trace = Trace()
    for step in range(1, steps + 1):
        rows = global_rows(config, step)[mesh.dp_rank :: mesh.layout.dp]
        saved = [shard.data.clone() for shard in engine.shards()] if step == poison else []
        if step == poison:
            if mesh.rank == mesh.layout.world - 1:
                with torch.no_grad():  # an infinite weight on one rank only: its loss and gradients are not finite
                    engine.shards()[0].data.fill_(float("inf"))
            engine.shards_written()
        engine.forward_backward(rows)
        if step == poison:
            with torch.no_grad():
                for shard, value in zip(engine.shards(), saved, strict=True):
                    shard.data.copy_(value)
        result = engine.update(config.optim.lr).read()
        trace.losses.append(result.loss)
        trace.norms.append(result.grad_norm)
        trace.tokens.append(result.tokens)
        trace.skipped.append(result.skipped)
    return trace, [replace(shard, data=shard.data.clone()) for shard in engine.shards()]


def build(config: Config, engine_name: str = "fsdp") -> tuple[Engine, Mesh]:
    ranks = torch.distributed.get_world_size()
    layout = layout_of(config, ranks) if engine_name != "toy" else Layout(dp_replicate=ranks)
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    return BUILDERS[engine_name](config, mesh, batch_plan(config, layout)), mesh


@cache
def reference(optimizer: str) -> Trace:
    return one_process(small_config(optim=SGD) if optimizer == "sgd" else small_config(), STEPS)


def agreed_votes(engine_name: str = "fsdp") -> list[frozenset[ControlFlag]]:
    engine, mesh = build(small_config(parallel=ParallelConfig(zero=0, engine=engine_name)))
    found = []
    for votes in (frozenset(), frozenset({ControlFlag.STOP}) if mesh.rank == 1 else frozenset()):
        engine.forward_backward(global_rows(small_config(), 1)[mesh.dp_rank :: mesh.layout.dp])
        found.append(engine.update(1e-3, StepFlags(votes)).read().votes)
    return found


def gathered_measurements(engine_name: str = "fsdp") -> tuple[tuple[float, ...], tuple[float, ...]]:
    engine, mesh = build(small_config(parallel=ParallelConfig(zero=0, engine=engine_name)))
    engine.forward_backward(global_rows(small_config(), 1)[mesh.dp_rank :: mesh.layout.dp])
    flags = StepFlags(frozenset(), 1.0 + mesh.rank, memory_bytes=1e12 + mesh.rank)
    result = engine.update(1e-3, flags).read()
    return result.work_seconds, result.memory_bytes


def step_without_a_valid_token(zero: int = 1, engine_name: str = "fsdp") -> tuple[bool, int, bool]:
    config = small_config(parallel=ParallelConfig(zero=zero, engine=engine_name))
    engine, mesh = build(config)
    before = [shard.data.clone() for shard in engine.shards()]
    rows = global_rows(config, 1)[mesh.dp_rank :: mesh.layout.dp]
    rows.labels.fill_(IGNORE_INDEX)
    engine.forward_backward(rows)
    result = engine.update(1e-2).read()
    unchanged = all(torch.equal(a, s.data) for a, s in zip(before, engine.shards(), strict=True))
    return result.skipped, result.tokens, unchanged


def evaluated(zero: int, engine_name: str = "fsdp") -> tuple[float, float]:
    config = small_config(
        parallel=ParallelConfig(zero=zero, engine=engine_name), batch=BatchConfig(size=8, micro_size=1)
    )
    engine, mesh = build(config)
    total = mesh.all_reduce(engine.evaluate(global_rows(config, 1)[mesh.dp_rank :: mesh.layout.dp]))
    engine.forward_backward(global_rows(config, 1)[mesh.dp_rank :: mesh.layout.dp])
    return float(total[0] / total[1]), engine.update(0.0).read().loss


def moved_through_shards(zero: int, engine_name: str = "fsdp") -> bool:
    """Shards are live: the next step computes with values written into them."""
    config = small_config(parallel=ParallelConfig(zero=zero, engine=engine_name))
    engine, mesh = build(config)
    rows = global_rows(config, 1)[mesh.dp_rank :: mesh.layout.dp]
    saved, state = [shard.data.clone() for shard in engine.shards()], engine.state()
    engine.forward_backward(rows)
    first = engine.update(1e-2).read()
    engine.forward_backward(rows)
    assert engine.update(1e-2).read().loss != first.loss
    engine.evaluate(rows)  # gathers parameters, which ZeRO 1 and 2 keep
    for shard, value in zip(engine.shards(), saved, strict=True):
        shard.data.copy_(value)
    engine.load_state(state)
    engine.shards_written()
    engine.forward_backward(rows)
    again = engine.update(1e-2).read()
    engine.forward_backward(rows)
    kinds = {shard.kind for shard in engine.shards()}
    return (
        first == again and engine.state() == {"step": 1.0} and kinds == {PARAMETER, "optim.exp_avg", "optim.exp_avg_sq"}
    )


def initial_shards(zero: int, engine_name: str = "fsdp") -> list[Shard]:
    engine, _ = build(small_config(parallel=ParallelConfig(zero=zero, engine=engine_name)))
    return [shard for shard in engine.shards() if shard.kind == PARAMETER]
