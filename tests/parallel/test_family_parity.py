"""Families of the decoder that compute other things than a Llama, on every kind of layout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from stoker.conf.schema import Config
from stoker.parallel.layout import Layout
from tests import world
from tests.parallel.parity import Case, assert_same, train
from tests.parallel.reference import Trace, one_process

STEPS = 3
FAMILIES: dict[str, dict[str, Any]] = {
    "smollm3": {"nope_layers": [1, 3]},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "olmo2": {"qk_norm": True, "qk_norm_over": "projection", "norm_placement": "after"},
    "phi3": {"sliding_window": 4, "partial_rotary_factor": 0.5},
    "gemma3": {
        "qk_norm": True,
        "norm_placement": "both",
        "zero_centered_norm": True,
        "hidden_act": "gelu_pytorch_tanh",
        "embedding_multiplier": 32**0.5,
        "sliding_window": 3,
        "full_attention_layers": [1, 3],
        "sliding_rope_theta": 50.0,
    },
}
WINDOWS = ("phi3", "gemma3")


def config_of(family: str, case: Case, layout: Layout) -> Config:
    config = case.config(layout)
    config.model = replace(config.model, **FAMILIES[family])
    return config


@cache
def alone(family: str) -> Trace:
    return one_process(config_of(family, Case(1), Layout()), STEPS)


def assert_one_run(layout: Layout, cases: list[tuple[str, Case]]) -> None:
    measured = world.run(train, layout.world, [config_of(*case, layout) for case in cases], STEPS, timeout=500.0)
    for (family, case), ranks in zip(cases, zip(*measured, strict=True), strict=True):
        assert_same(f"{family}, {case}", ranks, alone(family), 1e-4)


@pytest.mark.parametrize("context", ["gather", "ulysses"])
def test_ranks_that_share_sequences_see_as_far_as_a_window(context: str) -> None:
    assert_one_run(Layout(cp=2), [(family, Case(4, context=context)) for family in WINDOWS])


@pytest.mark.long
@pytest.mark.parametrize("layout", [Layout(dp_shard=2, zero=3), Layout(tp=2), Layout(pp=2)], ids=str)
def test_every_family_computes_what_one_process_computes(layout: Layout) -> None:
    kinds = [Case(4), Case(4, sequence=False)] if layout.tp > 1 else [Case(4)]
    assert_one_run(layout, [(family, case) for case in kinds for family in FAMILIES])
