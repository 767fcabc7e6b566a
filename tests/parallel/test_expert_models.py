"""Models with experts, whole on every rank, on every kind of layout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from torch import Tensor

from stoker.conf.schema import Config
from stoker.parallel.layout import Layout
from tests import world
from tests.extent import FULL, some
from tests.parallel.parity import Case, assert_same, train
from tests.parallel.reference import Trace, assemble, normwise, one_process

STEPS = 10 if FULL else 3
MODELS: dict[str, dict[str, Any]] = {
    "softmax": {"num_experts": 6, "moe_intermediate_size": 24},
    "sigmoid": {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "moe_intermediate_size": 12,
        "first_dense_layers": 1,
        "router": "sigmoid",
    },
}
LONG = [
    Layout(tp=2),
    Layout(dp_replicate=2),
    Layout(dp_shard=2, zero=1),
    Layout(dp_shard=2, zero=2),
    Layout(dp_shard=2, tp=2, zero=3),
]
LAYOUTS = [
    *(Layout(dp_shard=2, zero=3), Layout(pp=2)),
    *(pytest.param(layout, marks=pytest.mark.long) for layout in LONG),
]
CASES = [Case(1), Case(2), Case(4), Case(2, sequence=False)]


def config_of(model: str, case: Case, layout: Layout) -> Config:
    config = case.config(layout)
    config.model = replace(config.model, **MODELS[model])
    return config


@cache
def alone(model: str, optimizer: str = "adamw") -> Trace:
    return one_process(config_of(model, Case(1, optimizer=optimizer), Layout()), STEPS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_experts_compute_on_every_layout_what_one_process_computes(layout: Layout) -> None:
    chosen = [case for case in CASES if case.sequence or layout.tp > 1]
    cases = some([(model, case) for case in chosen for model in MODELS], 3)
    measured = world.run(train, layout.world, [config_of(*case, layout) for case in cases], STEPS, timeout=240.0)
    for (model, case), ranks in zip(cases, zip(*measured, strict=True), strict=True):
        assert_same(f"{layout}, {model}, {case}", ranks, alone(model), 1e-4)


@pytest.mark.parametrize("mode", ["full", pytest.param("selective", marks=pytest.mark.long)])
def test_recomputed_activations_are_routed_as_before(mode: str) -> None:
    config = config_of("sigmoid", Case(2), Layout())
    config.activation_checkpointing = mode
    measured = world.run(train, 1, [config], STEPS)
    assert_same(mode, [rank[0] for rank in measured], alone("sigmoid"), 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_experts_are_whole_under_deepspeed(zero: int) -> None:
    layout = Layout(2) if zero == 0 else Layout(1, 2, zero=zero)
    config = config_of("sigmoid", Case(4), layout)
    config.parallel.engine = "deepspeed"
    config.parallel.dp_replicate = layout.dp_replicate if zero else None
    measured = world.run(train, 2, [config], STEPS, timeout=300.0, fresh=True)
    assert_same(f"DeepSpeed ZeRO {zero}", [rank[0] for rank in measured], alone("sigmoid"), 1e-4)


def matrices(name: str, tensor: Tensor) -> list[Tensor]:
    """Those of a stack, one by one."""
    if tensor.dim() != 3:
        return [tensor]
    return [part for one in tensor for part in (one.chunk(2) if name.endswith("gate_up_proj") else [one])]


@pytest.mark.long
@pytest.mark.parametrize("layout", [Layout(dp_shard=2, zero=3), Layout(tp=2)], ids=str)
def test_muon_orthogonalises_the_matrices_of_each_expert(layout: Layout) -> None:
    case = Case(4, optimizer="muon")
    wanted = one_process(config_of("sigmoid", case, Layout()), 3, matrices_of=matrices)
    measured = world.run(train, layout.world, [config_of("sigmoid", case, layout)], 3)
    parameters = assemble([rank[0].parameters for rank in measured])
    for name, value in wanted.parameters.items():
        assert normwise(parameters[name], value) < 1e-4, name
