"""What `log.norms_by_role` and `objective.z_loss` add to a step, on layouts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from stoker.conf.schema import Config
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.update import StepMetrics
from stoker.trainer.parallelize import cut
from tests import world
from tests.parallel.parity import Case
from tests.parallel.reference import global_rows

STEPS = 3


def stepped(config: Config) -> list[StepMetrics]:
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    found = []
    for step in range(1, STEPS + 1):
        engine.forward_backward(global_rows(config, step)[mesh.dp_rank :: layout.dp])
        found.append(engine.update(config.optim.lr).read())
    return found


def config_of(layout: Layout, z_loss: float = 0.01) -> Config:
    config = Case(2, tied=layout.pp > 1).config(layout)
    config.log.norms_by_role, config.objective.z_loss = True, z_loss
    return config


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(1, 2, zero=2)], ids=str)
def test_norms_by_role_and_z_loss_are_those_of_one_process(layout: Layout) -> None:
    alone_config = config_of(Layout())
    alone_config.model.tie_word_embeddings = layout.pp > 1
    alone = world.run(stepped, 1, alone_config)[0]
    for found in world.run(stepped, layout.world, config_of(layout)):
        for one, other in zip(found, alone, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-5)
            assert one.scalars == pytest.approx(other.scalars, rel=1e-5)
            roles = ("matrix", "vector", "embedding") if layout.pp > 1 else ("matrix", "vector", "embedding", "head")
            of_roles = [one.scalars[f"grad_norm.{role}"] for role in roles]
            assert all(of_roles) and math.hypot(*of_roles) == pytest.approx(one.grad_norm, rel=1e-6)
    without = world.run(stepped, 1, config_of(Layout(), 0.0))[0]
    if layout.pp == 1:
        assert without[0].loss < alone[0].loss
