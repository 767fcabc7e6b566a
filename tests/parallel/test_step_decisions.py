"""Which steps an engine leaves out, and what it does with parameters that get no gradient: every strategy and stage."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from stoker.conf.schema import BatchConfig, Config, ModelConfig, OptimConfig, ParallelConfig
from stoker.parallel.engine import Engine
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import Mesh, mesh_over_default_group
from stoker.parallel.update import StepFlags, StepMetrics
from stoker.trainer.parallelize import cut
from tests import world
from tests.extent import some
from tests.parallel.conformance import train
from tests.parallel.parity import Case
from tests.parallel.reference import assemble, global_rows, initial_value, normwise, one_process, small_config

OWN = [
    Layout(), Layout(2), *(Layout(1, 2, zero=zero) for zero in (1, 2, 3)), Layout(tp=2), Layout(pp=2),
    Layout(1, 2, 2, 1, 3), Layout(1, 2, 1, 2, 2),
]  # fmt: skip
DEEPSPEED = [replace(layout, engine="deepspeed") for layout in (Layout(2), *(Layout(1, 2, zero=z) for z in (1, 2, 3)))]
LAYOUTS = [*OWN, *DEEPSPEED]


def run(function: Any, layout: Layout, *arguments: Any) -> list[Any]:
    return world.run(function, layout.world, *arguments, timeout=90.0, fresh=layout.engine == "deepspeed")


def config_of(layout: Layout, **changes: Any) -> Config:
    config = Case(4, tied=True).config(layout)
    config.parallel.engine = layout.engine
    config.parallel.dp_replicate = layout.dp_replicate if layout.zero else None
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def build(config: Config) -> tuple[Engine, Mesh]:
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    return cut(config, mesh, batch_plan(config, layout)), mesh


def step(config: Config, engine: Engine, mesh: Mesh, lr: float, said: StepFlags = StepFlags()) -> StepMetrics:  # noqa: B008
    engine.forward_backward(global_rows(config, 1)[mesh.dp_rank :: mesh.layout.dp])
    return engine.update(lr, said).read()


def values(engine: Engine) -> list[Tensor]:
    return [shard.data.clone() for shard in engine.shards()]


def under_ceilings(config: Config) -> dict[str, tuple[bool, bool, bool]]:
    """On a rank: the same step under ceilings around its own loss and norm. Was it skipped, as an overflow, and did any
    of the state change?
    """
    engine, mesh = build(config)
    seen = step(config, engine, mesh, 0.0)
    ceilings = {
        "a loss above": (0.99 * seen.loss, math.inf),
        "a norm above": (math.inf, 0.99 * seen.grad_norm),
        "only the loss above": (0.99 * seen.loss, 1.01 * seen.grad_norm),
        "only the norm above": (1.01 * seen.loss, 0.99 * seen.grad_norm),
        "both at their ceilings": (seen.loss, seen.grad_norm),
    }
    found = {}
    for name, (loss, norm) in ceilings.items():
        before = values(engine)
        result = step(config, engine, mesh, 1e-2, StepFlags(loss_ceiling=loss, norm_ceiling=norm))
        assert (result.loss, result.grad_norm) == (seen.loss, seen.grad_norm), f"{name}: another step"
        changed = not all(torch.equal(a, b) for a, b in zip(before, values(engine), strict=True))
        found[name] = result.skipped, result.overflowed, changed
    return found


@pytest.mark.long
@pytest.mark.parametrize("layout", some(LAYOUTS, 2), ids=str)
def test_a_step_above_its_ceiling_of_loss_or_norm_is_left_out_and_one_at_both_is_taken(layout: Layout) -> None:
    for found in run(under_ceilings, layout, config_of(layout)):
        taken = found.pop("both at their ceilings")
        assert taken == (False, False, True)
        assert found == dict.fromkeys(found, (True, False, False))


@contextmanager
def infinite_gradients() -> Iterator[None]:
    """Losses stay as they are; the gradients of what modules put out are infinite."""

    def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: gradient + math.inf)

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def overflowing_at(config: Config, scales: list[float]) -> list[tuple[StepMetrics, float]]:
    """On a rank: a step in which only the gradients of the last rank are infinite, at each loss scale; and the scale
    after it.
    """
    engine, mesh = build(config)
    found = []
    for scale in scales:
        engine.load_state({"step": 0.0, "loss_scale": scale})
        rows = global_rows(config, 1)[mesh.dp_rank :: mesh.layout.dp]
        if mesh.rank == mesh.layout.world - 1:
            with infinite_gradients():
                engine.forward_backward(rows)
        else:
            engine.forward_backward(rows)
        found.append((engine.update(1e-3).read(), engine.state()["loss_scale"]))
    return found


@pytest.mark.long
@pytest.mark.parametrize("layout", some(OWN, 2), ids=str)
def test_fp16_gradients_that_are_infinite_are_an_overflow_above_the_least_scale_and_bad_at_it(layout: Layout) -> None:
    for (above, after_above), (least, after_least) in run(
        overflowing_at, layout, config_of(layout, precision="fp16"), [2.0, 1.0]
    ):
        assert math.isfinite(above.loss) and math.isfinite(least.loss)
        assert above.skipped and above.overflowed and after_above == 1.0
        assert least.skipped and not least.overflowed and after_least == 1.0


SHIFTS = (1, 0, 1)  # of positions: where they do not begin at 0, the toy leaves its second layer out


def config_of_toy(layout: Layout, **changes: Any) -> Config:
    config = config_of(layout, **changes)
    config.model = small_config().model
    config.model.target = "tests.toy:build_skipping"
    return config


def partly_reached(config: Config) -> list[tuple[float, float, dict[str, bool]]]:
    """On a rank: loss, norm, and which of its gradients hold a number other than 0, for each of SHIFTS."""
    engine, mesh = build(config)
    found = []
    for shift in SHIFTS:
        rows = global_rows(config, 1)[mesh.dp_rank :: mesh.layout.dp]
        engine.forward_backward(replace(rows, positions=rows.positions + shift))
        gradients = {shard.name: bool(shard.data.any()) for shard in engine.gradient_shards()}
        result = engine.update(0.0).read()
        found.append((result.loss, result.grad_norm, gradients))
    return found


def alone(config: Config) -> list[tuple[float, float]]:
    """Loss and norm for each of SHIFTS in plain torch."""
    from stoker.parallel.model import whole_model
    from tests import toy

    model = toy.build_skipping(config.model, whole_model(config.model.num_hidden_layers))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(initial_value(config, name, tuple(parameter.shape)))
    found = []
    for shift in SHIFTS:
        rows = global_rows(config, 1)
        loss = model(rows.tokens, rows.positions + shift, None, rows.labels) / int(rows.valid_tokens())
        model.zero_grad()
        loss.backward()
        found.append(
            (
                loss.item(),
                float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])),
            )
        )
    return found


@pytest.mark.long
@pytest.mark.parametrize("layout", some(LAYOUTS, 2), ids=str)
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_parameter_that_no_loss_reaches_has_a_gradient_of_zero(layout: Layout, offload: str) -> None:
    """In the first step, where there is no gradient yet, and after one that has reached it."""
    config = config_of_toy(layout)
    config.parallel.offload = offload
    expected = alone(config)
    ranks = run(partly_reached, layout, config)
    for number, shift in enumerate(SHIFTS):
        reached: dict[str, bool] = {}
        for rank in ranks:
            loss, norm, gradients = rank[number]
            assert (loss, norm) == pytest.approx(expected[number], rel=1e-5), number
            for name, is_there in gradients.items():
                reached[name] = reached.get(name, False) or is_there
        skipped = {name for name in reached if name.startswith("layers.1.")}
        assert len(skipped) == 5 and {name for name, is_there in reached.items() if not is_there} == (
            skipped if shift else set()
        ), number


@pytest.mark.long
@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("layout", some([Layout(), *OWN[1:5], *DEEPSPEED], 2), ids=str)
def test_weight_decay_is_for_matrices_and_with_decay_all_for_everything(layout: Layout, decay_all: bool) -> None:
    config = small_config(batch=BatchConfig(size=8, micro_size=2))
    config.optim = OptimConfig(name="adamw", lr=1e-2, weight_decay=2.0, decay_all=decay_all)
    config.parallel = ParallelConfig(zero=layout.zero, engine=layout.engine)
    expected = one_process(copy.deepcopy(config), 4)
    parameters = assemble([shards for _, shards in run(train, layout, config, "fsdp", 4)])
    for name, value in expected.parameters.items():
        assert normwise(parameters[name], value) < 1e-4, name


def test_the_decay_of_the_reference_shows_in_every_parameter() -> None:
    """The test above could not fail otherwise."""
    config = small_config(
        model=ModelConfig(target="tests.toy:build", vocab_size=50, hidden_size=18, num_hidden_layers=1)
    )
    config.optim = OptimConfig(name="adamw", lr=1e-2, weight_decay=2.0)
    some = one_process(config, 4).parameters
    config.optim.decay_all = True
    every = one_process(config, 4).parameters
    for name, value in some.items():
        assert (normwise(every[name], value) > 1e-2) == name.endswith(("norm.weight", ".bias", "embedding.weight")), (
            name
        )
