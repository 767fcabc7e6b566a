"""Ranks that measure together: a slow one is named, a fair start has no findings of its own."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from stoker.conf.schema import BatchConfig, Config, ModelConfig, ParallelConfig
from stoker.conf.values import ConfigError
from stoker.parallel.layout import layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.trainer.probe import preflight as module
from stoker.trainer.probe.facts import Facts
from stoker.trainer.probe.judge import REFUSE, Finding, slow_ranks
from stoker.trainer.probe.links import KINDS
from stoker.trainer.probe.measure import PREFLIGHT, Effort, measure
from stoker.trainer.probe.passes import own_passes
from stoker.trainer.probe.products import Product, model_products
from stoker.trainer.runtime.process import Place
from tests import world
from tests.extent import some

BRIEF = Effort(
    windows=3, window_seconds=0.1, matrix_seconds=0.05, sizes={"cpu": (64,)}, own_seconds=0.05, memory_seconds=0.02,
    call_seconds=0.02, axis_seconds=0.1, axis_bytes=1 << 18,
)  # fmt: skip
MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48
)  # fmt: skip
WINDOWS = replace(PREFLIGHT, memory_seconds=0.0)


def _facts(effort: Effort, slow: int | None, products: tuple[Product, ...] = ()) -> list[Facts]:
    config = Config(model=MODEL, seq_len=16, batch=BatchConfig(4, 2), parallel=ParallelConfig(zero=1))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = mesh_over_default_group(layout_of(config, ranks), torch.device("cpu"), 60.0)
    place = Place(rank, ranks, rank, ranks, 0)
    before = torch.get_rng_state()
    found = measure(config, mesh, place, effort, products, repeats=4 if rank == slow else 1)
    assert torch.equal(before, torch.get_rng_state()), "the run's random numbers are untouched"
    return found


def test_all_ranks_have_what_all_ranks_found() -> None:
    products = (Product(64, 32, 48, 2), Product(64, 48, 32, 2))
    each = world.run(_facts, 2, BRIEF, None, products)
    assert each[0] == each[1]
    for rank, facts in enumerate(each[0]):
        assert (facts.rank, facts.first) == (rank, 0)
        assert facts.own and facts.memory and facts.peaks.keys() == {"bf16", "fp32"}
        assert [(link.axis, link.kind, link.ranks) for link in facts.axes] == [
            ("dp_shard", kind, [0, 1]) for kind in KINDS
        ]
        assert facts.call and 1e-7 < facts.call < 1e-3
        assert facts.passes is not None
        assert facts.passes.flops == pytest.approx(_flops_of_two_layers(rows=2), rel=0.03)
        assert facts.passes.calls > 100 and facts.passes.seconds > facts.passes.calls * facts.call / 10
        assert abs(facts.clock) < 0.5 and facts.versions["torch"] == torch.__version__
        assert (facts.machine is not None) is (rank == 0)
    assert each[0][0].machine is not None and each[0][0].machine.cores > 0


def _flops_of_two_layers(rows: int) -> int:
    """Of the linear layers, embedding aside, forward and backward, and of attention as if it were not causal."""
    hidden, tokens = MODEL.hidden_size, rows * 16
    weights = 2 * (4 * hidden**2 + 3 * hidden * MODEL.intermediate_size) + 64 * hidden
    return 6 * tokens * weights + 2 * 3 * 4 * tokens * 16 * hidden


@pytest.mark.long
@pytest.mark.parametrize("seed", some(range(20), 3))
def test_a_rank_with_four_times_the_work_is_named_and_no_other(seed: int) -> None:
    ranks = 4
    slow = random.Random(seed).randrange(ranks)
    assert list(slow_ranks(world.run(_facts, ranks, WINDOWS, slow)[0])) == [slow]


def test_the_models_products_are_a_ranks_share() -> None:
    model = ModelConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96
    )
    config = Config(model=model, seq_len=16, parallel=ParallelConfig(tp=2))
    config.batch.size, config.batch.micro_size = 8, 4
    alone = {(each.inputs, each.outputs): each for each in model_products(config, layout_of(Config(), 1))}
    assert all(each.tokens == 4 * 16 and each.count % 3 == 0 for each in alone.values())
    assert (96, 64) in alone and (64, 64) in alone
    shared = {(each.inputs, each.outputs) for each in model_products(config, layout_of(config, 2))}
    assert (48, 64) in shared and (64, 32) in shared, "of row-parallel and column-parallel layers"


def test_preflight_warns_on_the_first_rank_and_refuses_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("warn", "slow", "rank 1 is slow"), Finding(REFUSE, "version", "torch is another")]
    monkeypatch.setattr(module, "measure", lambda *_, **__: [])
    monkeypatch.setattr(module, "judge", lambda *_: findings)

    class OfRank:
        def __init__(self, rank: int) -> None:
            self.rank = rank

    for rank, expected in ((0, ["preflight: rank 1 is slow"]), (1, [])):
        said: list[str] = []
        with pytest.raises(ConfigError, match=r"^launch.preflight: torch is another$"):
            module.preflight(Config(), OfRank(rank), Place(rank, 2, rank, 2, 0), said.append)  # type: ignore[arg-type]
        assert said == expected


def _passes_of_unequal_ranks() -> list[bool]:
    """On a rank: whether there were passes where the other is slow, where it has no memory, and where both are fair."""
    ranks = dist.get_world_size()
    mesh = mesh_over_default_group(layout_of(Config(parallel=ParallelConfig(zero=1)), ranks), torch.device("cpu"), 60.0)
    first = mesh.rank == 0
    given = [(1e2 if first else 1e9, 1e9), (1e9, 1.0 if first else 1e9), (1e9, 1e9)]
    return [own_passes(MODEL, "fp32", 2, 16, mesh, 0.05, rate, free) is not None for rate, free in given]


def test_ranks_that_differ_agree_on_whether_the_models_passes_are_measured() -> None:
    assert world.run(_passes_of_unequal_ranks, 2, timeout=30.0) == [[False, False, True]] * 2
