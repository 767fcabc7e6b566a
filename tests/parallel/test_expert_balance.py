"""Counts of the tokens of experts, biases and losses that follow from them: the same on every layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stoker.conf.schema import Config, ModelConfig
from stoker.models.experts import SparseMlp
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import BUFFER, GRADIENT, Shard
from stoker.parallel.update import StepFlags
from stoker.trainer.parallelize import cut
from stoker.trainer.report.routing import in_words, routing_metrics
from tests import world
from tests.extent import some
from tests.parallel.parity import Case
from tests.parallel.reference import assemble, global_rows, normwise

STEPS = 10
EXPERTS, CHOICES, LAYERS, SPARSE = 5, 2, 4, 3
MODEL = {
    "num_experts": EXPERTS,
    "moe_intermediate_size": 24,
    "num_shared_experts": 1,
    "first_dense_layers": LAYERS - SPARSE,
    "router": "sigmoid",
    "router_bias": True,
    "router_bias_rate": 0.01,
    "router_aux_loss_coef": 0.05,
    "router_z_loss_coef": 0.01,
    "initializer_range": 0.2,
}


def config_of(case: Case, layout: Layout, checkpointing: str = "none") -> Config:
    config = case.config(layout)
    config.model = replace(config.model, **MODEL)
    config.parallel.ep = layout.ep
    config.activation_checkpointing = checkpointing
    return config


@dataclass(frozen=True)
class Seen:
    """On a rank: of each step the counts, and loss and norm; gradients of the first step; the buffers at the end."""

    routed: list[tuple[float, ...]]
    losses: list[tuple[float, float]]
    gradients: list[Shard]
    buffers: list[Shard]


def train(config: Config) -> Seen:
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    seen = Seen([], [], [], [])
    for step in range(1, STEPS + 1):
        rows = global_rows(config, step)[mesh.dp_rank :: layout.dp]
        engine.evaluate(rows)  # is not counted
        engine.forward_backward(rows)
        if step == 1:
            seen.gradients.extend(replace(s, data=s.data.clone()) for s in engine.gradient_shards())
        result = engine.update(config.optim.lr).read()
        seen.routed.append(result.routed)
        seen.losses.append((result.loss, result.grad_norm))
    seen.buffers.extend(replace(s, data=s.data.clone()) for s in engine.shards() if s.kind == BUFFER)
    return seen


ALONE = (Case(16), Layout(), "none")
OTHERS = [
    (Case(4), Layout(dp_shard=2, zero=3), "none"),
    (Case(4), Layout(tp=2), "none"),
    (Case(8), Layout(pp=2), "full"),
    (Case(1), Layout(), "none"),
    (Case(4, sequence=False), Layout(tp=2), "selective"),
    (Case(4), Layout(cp=2), "none"),
    (Case(2), Layout(dp_replicate=2), "full"),
    (Case(4), Layout(dp_shard=2, zero=1, tp=2), "none"),
    (Case(4), Layout(tp=2, pp=2), "none"),
]


@pytest.mark.parametrize(
    "case", [*OTHERS[:3], *(pytest.param(c, marks=pytest.mark.long) for c in some(OTHERS[3:], 3))], ids=str
)
def test_counts_and_biases_are_equal_to_the_last_bit_on_every_layout(case: tuple[Case, Layout, str]) -> None:
    """10 steps: the first bias that differs would send tokens elsewhere."""
    alone = world.run(train, 1, config_of(*ALONE))
    ranks = world.run(train, case[1].world, config_of(*case), timeout=240.0)
    wanted, buffers = alone[0], assemble([rank.buffers for rank in alone], BUFFER)
    for rank in ranks:
        assert [counts[:-2] for counts in rank.routed] == [counts[:-2] for counts in wanted.routed]
        for found, losses in zip(rank.routed, wanted.routed, strict=True):
            assert found[-2:] == pytest.approx(losses[-2:], rel=1e-5)
        for found, pair in zip(rank.losses, wanted.losses, strict=True):
            assert found == pytest.approx(pair, rel=1e-5)
    for name, value in assemble([rank.buffers for rank in ranks], BUFFER).items():
        assert torch.equal(value, buffers[name]) and value.any(), name
    gradients = assemble([rank.gradients for rank in ranks], GRADIENT)
    for name, value in assemble([rank.gradients for rank in alone], GRADIENT).items():
        assert normwise(gradients[name], value) < 1e-5, name


def test_every_choice_of_every_position_is_counted_once() -> None:
    config = config_of(*ALONE)
    (seen,) = world.run(train, 1, config)
    positions = config.batch.size * config.seq_len
    for counts in seen.routed:
        layers = torch.tensor(counts[:-2]).view(LAYERS, EXPERTS).sum(1).tolist()
        assert layers == [0.0] * (LAYERS - SPARSE) + [positions * CHOICES] * SPARSE
    moves = torch.zeros(LAYERS, EXPERTS)
    for counts in seen.routed:
        layers = torch.tensor(counts[:-2], dtype=torch.float64).view(LAYERS, EXPERTS)
        moves += (layers.mean(1, keepdim=True) - layers).sign().float() * 0.01
    for name, value in assemble([seen.buffers], BUFFER).items():
        assert torch.equal(value, moves[int(name.split(".")[1])]), name


def plainly(mlp: SparseMlp, x: Tensor, rows: int) -> Tensor:
    """The losses of the routers of `rows` sequences, from the papers, one by one."""
    total = torch.zeros(())
    for sequence in x.chunk(rows):
        logits = sequence @ mlp.router.weight.T
        scores = logits.sigmoid()
        chosen = (scores + mlp.router.bias).topk(CHOICES, -1).indices
        length = len(sequence)
        share = torch.zeros(EXPERTS)
        for token in chosen.tolist():
            for expert in token:
                share[expert] += EXPERTS / (CHOICES * length)
        mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
        total = total + length * 0.05 * (share * mean).sum()
        total = total + 0.01 * logits.exp().sum(-1).log().square().sum()
    return total


def test_losses_of_routers_are_those_of_their_papers() -> None:
    torch.manual_seed(0)
    mlp = SparseMlp(ModelConfig(hidden_size=16, num_hidden_layers=1, **MODEL))
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mlp.router.bias.copy_(torch.randn(EXPERTS) * 0.1)  # type: ignore[union-attr]
    mlp.loss_factor.fill_(0.5)
    x = torch.randn(3 * 7, 16, requires_grad=True)
    mlp(x, 3, 7).sum().backward()
    found = [x.grad, mlp.router.weight.grad]
    assert mlp.latest is not None
    value = mlp.latest[1].sum()
    x.grad = mlp.router.weight.grad = None
    mlp.coefficients = (0.0, 0.0)
    mlp(x, 3, 7).sum().backward()
    losses = plainly(mlp, x, 3)
    torch.testing.assert_close(value, losses.detach(), rtol=1e-5, atol=1e-6)
    (losses * 0.5).backward()
    for ours, wanted in zip(found, [x.grad, mlp.router.weight.grad], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def skipped(config: Config) -> tuple[bool, list[Shard]]:
    """On a rank: a step above its ceiling, and the biases after it."""
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    engine.forward_backward(global_rows(config, 1)[mesh.dp_rank :: layout.dp])
    result = engine.update(config.optim.lr, StepFlags(loss_ceiling=0.0)).read()
    return result.skipped, [s for s in engine.shards() if s.kind == BUFFER]


def test_a_skipped_step_moves_no_bias() -> None:
    ((left_out, buffers),) = world.run(skipped, 1, config_of(*ALONE))
    assert left_out and len(buffers) == SPARSE
    assert not any(shard.data.any() for shard in buffers)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([[0, 0, 0, 0], [5, 5, 5, 5]], "entropy 1.000, the busiest has 1.00 x the mean (expert 0 of layer 1)"),
        (
            [[20, 0, 0, 0], [5, 5, 5, 5]],
            "entropy 0.500, the busiest has 4.00 x the mean (expert 0 of layer 0), overloaded, 3 without a token "
            "(expert 1 of layer 0 first), the busiest rank has 2.00 x the mean",
        ),
    ],
)
def test_what_is_uneven_is_named(counts: list[list[float]], words: str) -> None:
    config = Config(model=ModelConfig(num_experts=4, num_hidden_layers=2))
    config.parallel.ep = 2 if "rank" in words else 1
    found = routing_metrics([float(n) for own in counts for n in own] + [0.0, 0.0], config)
    assert in_words(found) == words and found["dropped_tokens"] == 0
