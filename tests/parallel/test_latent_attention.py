"""Models with latent attention and groups of experts compute on every layout what one process computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from stoker.conf.schema import Config
from stoker.parallel.layout import Layout
from tests import world
from tests.extent import FULL, some
from tests.parallel.parity import Case, assert_same, train
from tests.parallel.reference import Trace, one_process

STEPS = 10 if FULL else 3
LATENTS = {
    "num_key_value_heads": None,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "experts": {
        **LATENTS,
        "q_lora_rank": 20,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 1,
        "first_dense_layers": 1,
        "moe_intermediate_size": 12,
        "router": "sigmoid",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    },
    "dense": {**LATENTS, "v_head_dim": 14, "rope_interleave": False},
}


def layouts() -> Iterator[Layout]:
    """Of two ranks, then of four."""
    yield from (Layout(dp_shard=2, zero=3, ep=2), Layout(tp=2), Layout(pp=2), Layout(cp=2))
    yield from (Layout(dp_shard=2, zero=zero, ep=ep) for zero in (1, 2) for ep in (1, 2))
    yield from (Layout(dp_replicate=2, ep=2), Layout(dp_shard=2, zero=3))
    yield from (Layout(dp_shard=2, tp=2, zero=zero, ep=2) for zero in (3, 2, 1))
    yield from (Layout(tp=2, pp=2), Layout(dp_shard=2, pp=2, zero=1, ep=2), Layout(tp=4))
    yield from (Layout(tp=2, cp=2), Layout(dp_shard=2, cp=2, zero=3, ep=4), Layout(pp=2, cp=2))
    yield from (Layout(dp_shard=4, zero=3, ep=4), Layout(dp_replicate=2, dp_shard=2, zero=2, ep=2))


def cases(layout: Layout) -> list[tuple[str, Case]]:
    of = [Case(4), Case(2)]
    if layout.tp > 1:
        of = [Case(4), Case(2, sequence=False)]
    if layout.cp > 1:
        of = [Case(4), Case(4, context="ulysses")]
    names = [name for name in MODELS if name == "experts" or layout.ep == 1]
    return [(name, case) for case in of for name in names]


def config_of(model: str, case: Case, layout: Layout) -> Config:
    config = case.config(layout)
    config.model = replace(config.model, **MODELS[model])
    config.parallel.ep = layout.ep
    return config


@cache
def alone(model: str) -> Trace:
    return one_process(config_of(model, Case(1), Layout()), STEPS)


def marked() -> Iterator[Any]:
    for number, layout in enumerate(layouts()):
        if number < 4:
            yield pytest.param(layout, id=str(layout), marks=[pytest.mark.long] if number == 3 else [])
        elif FULL or number in (8, 10, 13, 17):
            yield pytest.param(layout, id=str(layout), marks=pytest.mark.long)


@pytest.mark.parametrize("layout", list(marked()))
def test_latent_attention_computes_on_every_layout_what_one_process_computes(layout: Layout) -> None:
    chosen = some(cases(layout), 3)
    measured = world.run(train, layout.world, [config_of(*case, layout) for case in chosen], STEPS, timeout=500.0)
    for (model, case), ranks in zip(chosen, zip(*measured, strict=True), strict=True):
        assert_same(f"{layout}, {model}, {case}", ranks, alone(model), 1e-4)


@pytest.mark.parametrize("mode", ["full", pytest.param("selective", marks=pytest.mark.long)])
def test_recomputed_latents_change_nothing(mode: str) -> None:
    config = config_of("experts", Case(4), Layout())
    config.activation_checkpointing = mode
    measured = world.run(train, 1, [config], STEPS)
    assert_same(mode, [rank[0] for rank in measured], alone("experts"), 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("zero", [1, 3])
def test_latent_attention_trains_under_deepspeed(zero: int) -> None:
    layout = Layout(1, 2, zero=zero)
    config = config_of("dense", Case(4), layout)
    config.parallel.engine = "deepspeed"
    measured = world.run(train, 2, [config], STEPS, timeout=300.0, fresh=True)
    assert_same(f"DeepSpeed ZeRO {zero}", [rank[0] for rank in measured], alone("dense"), 1e-4)
