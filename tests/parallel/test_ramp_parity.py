"""Steps of several sizes in one run, as `batch.ramp` makes them, on layouts against one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from stoker.conf.schema import Config
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import PARAMETER, Shard
from stoker.trainer.parallelize import cut
from tests import world
from tests.extent import some
from tests.parallel.parity import Case
from tests.parallel.reference import assemble, global_rows, normwise

SIZES = [8, 8, 16, 16, 8]


def config_of(layout: Layout, schedule: str = "1f1b", engine: str = "fsdp") -> Config:
    config = Case(2, schedule, tied=layout.pp > 1).config(layout)
    config.batch.ramp, config.parallel.engine = [[8, 200.0]], engine
    return config


def stepped(config: Config) -> tuple[list[tuple[float, float, int]], list[Shard]]:
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    found = []
    for step, size in enumerate(SIZES, 1):
        rows = global_rows(replace(config, batch=replace(config.batch, size=size)), step)
        engine.forward_backward(rows[mesh.dp_rank :: layout.dp])
        result = engine.update(config.optim.lr).read()
        found.append((result.loss, result.grad_norm, result.tokens))
    return found, [replace(s, data=s.data.clone()) for s in engine.shards() if s.kind == PARAMETER]


CASES = [
    (Layout(1, 2, zero=2), "1f1b", "fsdp"),
    (Layout(pp=2), "1f1b", "fsdp"),
    (Layout(pp=2), "interleaved", "fsdp"),
    (Layout(pp=2), "gpipe", "fsdp"),
    (Layout(1, 2, zero=2), "1f1b", "deepspeed"),
    (Layout(tp=2), "1f1b", "fsdp"),
    (Layout(1, 2, zero=3), "1f1b", "deepspeed"),
]


@pytest.mark.long
@pytest.mark.parametrize(("layout", "schedule", "engine"), some(CASES, 2), ids=str)
def test_steps_of_every_size_are_those_of_one_process(layout: Layout, schedule: str, engine: str) -> None:
    config = config_of(layout, schedule, engine)
    alone_config = config_of(Layout())
    alone_config.model.tie_word_embeddings = config.model.tie_word_embeddings
    ((alone, shards),) = world.run(stepped, 1, alone_config)
    ranks = world.run(stepped, layout.world, config, fresh=engine == "deepspeed", timeout=200.0)
    wanted = assemble([shards])
    for found, _ in ranks:
        for one, other in zip(found, alone, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
    for name, value in assemble([own for _, own in ranks]).items():
        assert normwise(value, wanted[name]) < 1e-4, name
