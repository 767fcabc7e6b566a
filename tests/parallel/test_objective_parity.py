"""Objectives on every layout: the losses, rewards, norms and adapters of plain torch with two models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stoker.conf.schema import Config
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import GRADIENT, PARAMETER, Shard
from stoker.parallel.update import StepMetrics
from stoker.trainer.parallelize import cut
from tests import world
from tests.extent import some
from tests.parallel.parity import Case, cases, layouts
from tests.parallel.preferences import OBJECTIVES, STEPS, Expected, config_of, in_plain_torch, pairs
from tests.parallel.reference import assemble, normwise


@dataclass(frozen=True)
class Measured:
    steps: list[StepMetrics]
    evaluated: list[float]
    gradients: list[Shard]  # of the last step
    parameters: list[Shard]


def train(configs: list[Config]) -> list[Measured]:
    """On a rank: every config, all of the same layout, from the start."""
    layout = layout_of(configs[0], dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    found = []
    for config in configs:
        engine = cut(config, mesh, batch_plan(config, layout))
        steps = []
        for step in range(1, STEPS + 1):
            engine.forward_backward(pairs(config, step)[mesh.dp_rank :: layout.dp])
            gradients = engine.gradient_shards()
            steps.append(engine.update(config.optim.lr).read())
        # Three rows fill no micro-batch.
        evaluated = mesh.all_reduce(engine.evaluate(pairs(config, STEPS)[mesh.dp_rank :: layout.dp][:3]))
        parameters = [shard for shard in engine.shards() if shard.kind == PARAMETER]
        found.append(Measured(steps, evaluated.tolist(), gradients, parameters))
    return found


@cache
def expected(name: str, tied: bool) -> Expected:
    return in_plain_torch(config_of(name, Layout(), Case(1, tied=tied)))


def assert_plain_torch(layout: Layout, chosen: list[tuple[str, Case]]) -> None:
    ranks = world.run(train, layout.world, [config_of(name, layout, case) for name, case in chosen], timeout=240.0)
    for (name, case), *found in zip(chosen, *ranks, strict=True):
        assert_as_expected(f"{name} on {layout}, {case}", name, case, found)


def assert_as_expected(where: str, name: str, case: Case, found: list[Measured]) -> None:
    wanted = expected(name, case.tied)
    steps = found[0].steps
    assert [step.loss for step in steps] == pytest.approx(wanted.losses, rel=1e-5), where
    assert [step.grad_norm for step in steps] == pytest.approx(wanted.norms, rel=1e-5), where
    for step, scalars in zip(steps, wanted.scalars, strict=True):
        assert step.scalars == pytest.approx(scalars, rel=1e-5, abs=1e-6), where
    numbers = [[replace(step, work_seconds=()) for step in rank.steps] for rank in found]
    assert all(rank == numbers[0] for rank in numbers), f"{where}: ranks disagree about a step"
    gradients = assemble([rank.gradients for rank in found], GRADIENT)
    parameters = assemble([rank.parameters for rank in found])
    # All together: the gradient of a tensor that hardly counts is rounding of the others.
    assert normwise(flat(gradients, wanted.gradients), flat(wanted.gradients)) < 1e-5, where
    assert normwise(flat(parameters, wanted.trained), flat(wanted.trained)) < 1e-5, where


def flat(tensors: dict[str, Tensor], names: Iterable[str] | None = None) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in names or tensors])


SHORT = [
    ("dpo", Layout(pp=2)),
    pytest.param("kto", Layout(pp=2), marks=pytest.mark.long),
    ("kto", Layout(1, 2, zero=3)),
    pytest.param("distill", Layout(pp=2), marks=pytest.mark.long),
    ("distill", Layout(tp=2)),
    ("weights", Layout(tp=2)),
]


@pytest.mark.parametrize(("name", "layout"), SHORT, ids=str)
def test_a_layout_trains_as_plain_torch_with_two_models(name: str, layout: Layout) -> None:
    assert_plain_torch(layout, [(name, Case(4))])


UNDER_DEEPSPEED = [*(Layout(1, 2, zero=zero) for zero in (1, 2, 3)), Layout(2), Layout(tp=2, zero=1), Layout(pp=2)]


def train_each(configs: list[Config]) -> list[Measured]:
    """On a rank: every config, each with another layout."""
    return [train([config])[0] for config in configs]


@pytest.mark.long
def test_under_deepspeed_every_objective_trains_as_plain_torch_with_two_models() -> None:
    chosen = [
        (name, UNDER_DEEPSPEED[n % len(UNDER_DEEPSPEED)], Case(4))
        for n, name in some(list(enumerate([*OBJECTIVES, "dpo", "dpo", "kto"])), 2)
    ]
    configs = [config_of(*each) for each in chosen]
    for config, (_, layout, _) in zip(configs, chosen, strict=True):
        config.parallel.engine = "deepspeed"
        config.parallel.dp_replicate = layout.dp_replicate if layout.zero else None
    ranks = world.run(train_each, 2, configs, timeout=300.0, fresh=True)
    for (name, layout, case), *found in zip(chosen, *ranks, strict=True):
        assert_as_expected(f"{name} on {layout}, DeepSpeed", name, case, found)


OF_FOUR = [Layout(1, 2, 2, 1, 3), Layout(1, 1, 2, 2, 0)]


@pytest.mark.long
@pytest.mark.parametrize("layout", some([Layout(), *layouts(2), *OF_FOUR], 3), ids=str)
def test_every_objective_trains_as_plain_torch_with_two_models(layout: Layout) -> None:
    chosen = cases(layout)
    assert_plain_torch(layout, [(name, chosen[n % len(chosen)]) for n, name in enumerate(OBJECTIVES, layout.zero)])
