"""Adapters on every layout: one process's losses, norms and trained tensors; frozen tensors to the last bit."""

from __future__ import annotations

import pytest
import torch

from stoker.conf.schema import AdapterConfig, Config
from stoker.parallel.layout import Layout
from stoker.parallel.shards import GRADIENT
from tests import world
from tests.extent import some
from tests.parallel.parity import Case, Measured, cases, layouts, train
from tests.parallel.reference import assemble, normwise

STEPS = 10
ADAPTERS = {
    "all linear": AdapterConfig("lora", rank=4),
    "some": AdapterConfig(
        "lora",
        rank=4,
        alpha=3.0,
        rslora=True,
        target_modules=["k_proj", "*.mlp.*"],
        layers_to_transform=[2, 3],
        rank_pattern={"down": 6},
        modules_to_save=["norm", "embedding"],
    ),
    "dropout": AdapterConfig("lora", rank=4, dropout=0.3),
    "dora": AdapterConfig("dora", rank=4, alpha=6.0),
    "of the end": AdapterConfig("lora", rank=4, layers_to_transform=[3]),  # the first stage trains nothing
}


def config_of(case: Case, layout: Layout, adapter: str) -> Config:
    config = case.config(layout)
    config.adapter = ADAPTERS[adapter]
    if config.adapter.dropout and layout.world > 1:  # which one process does without
        config.activation_checkpointing = "selective" if layout.zero % 2 else "full"
    return config


def assert_one_run(layout: Layout, chosen: list[tuple[Case, str]]) -> None:
    """Each of `chosen` on `layout` and on one rank."""
    alone = world.run(
        train,
        1,
        [config_of(Case(4, tied=c.tied, optimizer=c.optimizer), Layout(), a) for c, a in chosen],
        timeout=240.0,
    )[0]
    ranks = world.run(train, layout.world, [config_of(c, layout, a) for c, a in chosen], timeout=240.0)
    for (case, adapter), wanted, *found in zip(chosen, alone, *ranks, strict=True):
        assert_same(f"{layout}, {case}, {adapter}", wanted, found)


def assert_same(where: str, wanted: Measured, found: list[Measured]) -> None:
    assert found[0].trace.losses == pytest.approx(wanted.trace.losses, rel=1e-5), where
    assert found[0].trace.norms == pytest.approx(wanted.trace.norms, rel=1e-5), where
    trained = {shard.name for shard in wanted.gradients}
    assert any("lora" in name for name in trained) and len(trained) < len(wanted.parameters), where
    parameters = assemble([rank.parameters for rank in found])
    for name, value in assemble([wanted.parameters]).items():
        if name in trained:
            assert normwise(parameters[name], value) < 1e-5, f"{where}: {name}"
        else:
            assert torch.equal(parameters[name], value), f"{where}: {name}"


SHORT = [
    (Layout(dp_shard=2, zero=3), [(Case(4), "all linear"), (Case(1), "dropout")]),
    (Layout(tp=2), [(Case(4, tied=True), "some"), (Case(4), "dora")]),
    (Layout(pp=2), [(Case(1), "dropout"), (Case(4), "dora")]),
]


@pytest.mark.parametrize(("layout", "chosen"), SHORT, ids=str)
def test_a_layout_trains_the_adapter_of_one_process(layout: Layout, chosen: list[tuple[Case, str]]) -> None:
    assert_one_run(layout, chosen)


@pytest.mark.long
@pytest.mark.parametrize("layout", [*layouts(2), *some(list(layouts(4)), 5)], ids=str)
def test_every_layout_trains_the_adapter_of_one_process(layout: Layout) -> None:
    shallow = [case for case in cases(layout) if layout.pp < 4 or case.schedule != "interleaved"]  # four layers
    turns = ("all linear", "some", "dropout", "dora")
    assert_one_run(layout, [(case, turns[(n + layout.zero) % len(turns)]) for n, case in enumerate(shallow)])


@pytest.mark.long
@pytest.mark.parametrize("context", ["gather", "ulysses"])
def test_ranks_that_share_sequences_drop_what_one_process_drops(context: str) -> None:
    assert_one_run(Layout(cp=2), [(Case(4, context=context), "dropout"), (Case(2, context=context), "dora")])


@pytest.mark.long
def test_in_bf16_lengths_of_rows_are_trained_in_fp32() -> None:
    layout = Layout(1, 2, zero=3)
    alone, sharded = config_of(Case(4), Layout(), "dora"), config_of(Case(4), layout, "dora")
    alone.precision = sharded.precision = "bf16"
    (wanted,) = world.run(train, 1, [alone], 4, timeout=240.0)[0]
    found = [rank[0] for rank in world.run(train, 2, [sharded], 4, timeout=240.0)]
    assert found[0].trace.losses == pytest.approx(wanted.trace.losses, rel=2e-3)
    gradients, expected = (assemble([m.gradients for m in ranks], GRADIENT) for ranks in (found, [wanted]))
    for name, value in expected.items():
        if name.endswith("magnitude.weight"):
            assert normwise(gradients[name], value) < 2e-2, name


STAGES = [Layout(2), *(Layout(1, 2, zero=zero) for zero in (1, 2, 3))]
UNDER_DEEPSPEED = [
    *[(layout, Case(4), "dropout") for layout in STAGES],
    *[(layout, Case(8, tied=True, optimizer="sgd"), "some") for layout in STAGES],
    (Layout(tp=2, zero=1), Case(4), "dora"),
    (Layout(1, 2, zero=2), Case(4), "dora"),
    (Layout(pp=2), Case(4), "all linear"),
    (Layout(pp=2, zero=1), Case(4, "gpipe", optimizer="sgd"), "of the end"),
]
TRIED = some(UNDER_DEEPSPEED, 2)


def train_each(configs: list[Config]) -> list[Measured]:
    """On a rank: every config, each with another layout."""
    return [train([config])[0] for config in configs]


def of_deepspeed(layout: Layout, case: Case, adapter: str) -> Config:
    config = config_of(case, layout, adapter)
    config.parallel.engine = "deepspeed"
    config.parallel.dp_replicate = layout.dp_replicate if layout.zero else None
    if layout.zero == 3:
        config.activation_checkpointing = "full"  # selective is refused
    return config


@pytest.mark.long
def test_under_deepspeed_every_stage_trains_the_adapter_of_one_process() -> None:
    chosen = [(Case(4, tied=c.tied, optimizer=c.optimizer), adapter) for _, c, adapter in TRIED]
    alone = world.run(train, 1, [config_of(c, Layout(), a) for c, a in chosen], timeout=240.0)[0]
    configs = [of_deepspeed(*each) for each in TRIED]
    ranks = world.run(train_each, 2, configs, timeout=300.0, fresh=True)
    for each, wanted, *found in zip(TRIED, alone, *ranks, strict=True):
        assert_same(f"DeepSpeed, {each}", wanted, found)


@pytest.mark.long
@pytest.mark.parametrize("sequence", [True, False])
def test_kv_heads_that_ranks_share_have_the_adapter_of_one_process(sequence: bool) -> None:
    assert_one_run(Layout(tp=4), [(Case(4, sequence=sequence), "all linear")])
