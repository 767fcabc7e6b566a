"""Adapters on every layout: one process's losses, norms and trained tensors; frozen tensors to the last bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from stoker.conf.schema import AdapterConfig, Config
from stoker.parallel.layout import Layout
from stoker.parallel.shards import GRADIENT
from tests import world
from tests.extent import some
from tests.parallel.parity import ROWS, Case, Measured, factorisations, layouts, train
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


# At lr 0.1, which other models bear, SGD lets rounding grow past the bound, on one rank too. With DoRA (from rows of
# length 1) norms of micro-batches of 1 to 16 rows are by step 10 up to 4.7e-5 from those in fp64, and fp64's own move
# by 1.1e-5 where the first values do by 1e-8; with dropout micro-batches differ by 1.3e-5. At 0.01: within 7e-7.
SGD_LR = 0.01


def config_of(case: Case, layout: Layout, adapter: str, layers: int = 4) -> Config:
    config = case.config(layout, layers)
    config.adapter = ADAPTERS[adapter]
    if config.optim.name == "sgd":
        config.optim.lr = SGD_LR
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


SHORT = [  # the long tests have every kind on every layout
    (Layout(dp_shard=2, zero=3), Case(4), "all linear"),
    (Layout(tp=2), Case(4, tied=True), "dora"),
    (Layout(pp=2), Case(4), "dropout"),
    pytest.param(Layout(pp=2), Case(1), "dropout", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("layout", "case", "adapter"), SHORT, ids=str)
def test_a_layout_trains_the_adapter_of_one_process(layout: Layout, case: Case, adapter: str) -> None:
    assert_one_run(layout, [(case, adapter)])


@dataclass(frozen=True)
class Trial:
    """A cell of the matrix."""

    layout: Layout
    case: Case
    adapter: str
    engine: str = "fsdp"

    @property
    def layers(self) -> int:
        """As many as there are stages, at least."""
        return 8 if self.layout.pp == 4 and self.case.schedule == "interleaved" else 4

    def config(self) -> Config:
        config = config_of(self.case, self.layout, self.adapter, self.layers)
        if self.engine == "deepspeed":
            config.parallel.engine = self.engine
            config.parallel.dp_replicate = self.layout.dp_replicate if self.layout.zero else None
            if self.layout.zero == 3 and config.activation_checkpointing == "selective":
                config.activation_checkpointing = "full"  # selective is refused
        return config


def matrix(ranks: int, engine: str) -> list[Trial]:
    """Every layout, schedule and share of tokens, tied and not. Micro-batches, optimizers and adapters take turns."""
    adapters = ("all linear", "some", "dropout", "dora", "of the end")
    found: list[Trial] = []
    for layout in layouts(ranks) if engine == "fsdp" else layouts_of_deepspeed(ranks):
        schedules = ("1f1b", "gpipe", "interleaved") if layout.pp > 1 else ("1f1b",)
        sequences = (True, False) if layout.tp > 1 else (True,)
        for schedule, sequence, tied in itertools.product(schedules, sequences, (False, True)):
            turn, stages = len(found), layout.pp * (2 if schedule == "interleaved" else 1)
            rows = ROWS // layout.dp
            counts = [count for count in (8, 4, 2, 1) if rows % count == 0 and stages <= count <= max(4, 2 * stages)]
            micro = rows // counts[0 if turn % 3 else -1]
            # In eight layers AdamW lets one process's own rounding grow past 1e-5.
            optimizer = "sgd" if turn // 2 % 2 or stages == 8 else "adamw"
            case = Case(micro, schedule, tied=tied, optimizer=optimizer, sequence=sequence)
            found.append(Trial(layout, case, adapters[turn % len(adapters)], engine))
    return found


def layouts_of_deepspeed(ranks: int) -> Iterator[Layout]:
    """Every factorisation with the stages of ZeRO that DeepSpeed has on it, also where nothing is sharded."""
    for replicate, shard, tp, pp in factorisations(ranks):
        zeros = (1, 2, 3) if shard > 1 else (0,) if replicate > 1 else (0, 1, 2, 3)
        yield from (Layout(replicate, shard, tp, pp, zero) for zero in zeros if zero < 2 or pp == 1)


@cache
def alone(tied: bool, optimizer: str, adapter: str, layers: int) -> Measured:
    """What one process computes."""
    config = config_of(Case(4, tied=tied, optimizer=optimizer), Layout(), adapter, layers)
    found: Measured = world.run(train, 1, [config], timeout=240.0)[0][0]
    return found


def train_each(configs: list[Config]) -> list[Measured]:
    """On a rank: every config, each with another layout."""
    return [train([config])[0] for config in configs]


# How many cells there are to one that is tried, for engines and ranks: `STOKER_TESTS=full` tries all.
EVERY = {
    ("fsdp", 1): 1,
    ("fsdp", 2): 3,
    ("fsdp", 4): 19,
    ("deepspeed", 1): 5,
    ("deepspeed", 2): 9,
    ("deepspeed", 4): 47,
}


PART = 8  # cells that share a start of ranks


def parts_of_the_matrix() -> Iterator[tuple[str, int, int]]:
    """Engine, ranks and the first cell of each part."""
    for (engine, ranks), every in EVERY.items():
        yield from ((engine, ranks, start) for start in range(0, len(some(matrix(ranks, engine), every)), PART))


@pytest.mark.long
@pytest.mark.parametrize(("engine", "ranks", "start"), list(parts_of_the_matrix()))
def test_every_layout_trains_the_adapter_of_one_process(engine: str, ranks: int, start: int) -> None:
    trials = some(matrix(ranks, engine), EVERY[engine, ranks])[start : start + PART]
    configs = [trial.config() for trial in trials]
    measured = world.run(train_each, ranks, configs, timeout=300.0, fresh=engine == "deepspeed")
    for trial, *found in zip(trials, *measured, strict=True):
        case = trial.case
        assert_same(str(trial), alone(case.tied, case.optimizer, trial.adapter, trial.layers), found)


@pytest.mark.long
@pytest.mark.parametrize("context", some(["gather", "ulysses"], 2))
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


@pytest.mark.long
@pytest.mark.parametrize("sequence", [True, False])
def test_kv_heads_that_ranks_share_have_the_adapter_of_one_process(sequence: bool) -> None:
    assert_one_run(Layout(tp=4), [(Case(4, sequence=sequence), "all linear")])
