"""Counts of the tokens of experts, biases and losses that follow from them: the same on every layout."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stoker.conf.schema import Config, ModelConfig
from stoker.models.experts import SparseMlp
from stoker.parallel.engine import Engine
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import BUFFER, GRADIENT, Shard
from stoker.parallel.update import StepFlags
from stoker.trainer.parallelize import cut
from stoker.trainer.rehearsal.collectives import Collectives
from stoker.trainer.report.routing import expert_tokens, in_words, routing_metrics
from tests import world
from tests.extent import some
from tests.parallel.parity import Case
from tests.parallel.reference import assemble, global_rows, normwise

STEPS = 10
CLOSE = 1e-5  # scores that rounding may put in another order
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
class Tie:
    """A token for which the last expert that is chosen and the first that is not are closer than rounding."""

    step: int
    layer: int
    row: int
    position: int
    apart: float  # of their scores

    def __str__(self) -> str:
        where = f"step {self.step}, layer {self.layer}, row {self.row}, position {self.position}"
        return f"{where}: two experts are {self.apart:.1e} apart"


@dataclass(frozen=True)
class Seen:
    """On a rank: of each step the counts, and loss and norm; gradients of the first step; the buffers at the end.

    `ties` are of whole batches in one micro-batch only.
    """

    routed: list[tuple[float, ...]]
    losses: list[tuple[float, float]]
    gradients: list[Shard]
    buffers: list[Shard]
    ties: list[Tie] = field(default_factory=list)


def ties_of(ranked: Tensor, chosen: int, step: int, layer: int, seq_len: int) -> list[Tie]:
    """Among tokens with the scores `ranked`, `[tokens, experts]`, by which so many are chosen of each."""
    best = ranked.topk(chosen + 1, -1).values
    apart = best[:, -2] - best[:, -1]
    near = (apart < CLOSE).nonzero()[:, 0].tolist()
    return [Tie(step, layer, n // seq_len, n % seq_len, float(apart[n])) for n in near]


def note_ties(engine: Engine, seen: Seen, seq_len: int) -> None:
    """Add the ties of each step of training to `seen`."""

    def noting(layer: int) -> Any:
        def note(router: Any, _: Any, output: tuple[Tensor, ...]) -> None:
            if router.training:
                ranked = output[3].detach() + router.bias
                seen.ties.extend(ties_of(ranked, router.chosen, len(seen.routed) + 1, layer, seq_len))

        return note

    for number, block in engine.modules()[0].blocks().items():  # type: ignore[operator]
        if isinstance(block.mlp, SparseMlp):
            block.mlp.router.register_forward_hook(noting(int(number)))


def train(config: Config) -> Seen:
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    seen = Seen([], [], [], [])
    if batch_plan(config, layout).micro_rows == config.batch.size:
        note_ties(engine, seen, config.seq_len)
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
    "case", [*OTHERS[:2], *(pytest.param(c, marks=pytest.mark.long) for c in some(OTHERS[2:], 3))], ids=str
)
def test_counts_and_biases_are_equal_to_the_last_bit_on_every_layout(case: tuple[Case, Layout, str]) -> None:
    """10 steps: the first bias that differs would send tokens elsewhere."""
    alone = world.run(train, 1, config_of(*ALONE))
    ranks = world.run(train, case[1].world, config_of(*case), timeout=240.0)
    assert_same_routes(str(case), ranks, alone[0])


def assert_same_routes(where: str, ranks: list[Seen], alone: Seen) -> None:
    """`ranks` computed what one process did: counts and biases to the last bit.

    Where a count differs because of a tie, its token is named, and the steps from there on are not compared.
    """
    steps = same_steps(where, ranks[0], alone)
    for rank in ranks:
        assert rank.routed == ranks[0].routed, f"{where}: ranks disagree about counts"
        for found, losses in zip(rank.routed[:steps], alone.routed, strict=False):
            assert found[-2:] == pytest.approx(losses[-2:], rel=1e-5), where
        for found, pair in zip(rank.losses[:steps], alone.losses, strict=False):
            assert found == pytest.approx(pair, rel=1e-5), where
    buffers = assemble([alone.buffers], BUFFER)
    for name, value in assemble([rank.buffers for rank in ranks], BUFFER).items():
        assert value.any() and (steps < STEPS or torch.equal(value, buffers[name])), f"{where}: {name}"
    gradients = assemble([rank.gradients for rank in ranks], GRADIENT)
    for name, value in assemble([alone.gradients], GRADIENT).items():
        assert steps == 0 or normwise(gradients[name], value) < 1e-5, f"{where}: {name}"


def same_steps(where: str, found: Seen, alone: Seen) -> int:
    """How many steps have equal counts: all, or those before one with a tie, whose token is printed."""
    for step, (ours, wanted) in enumerate(zip(found.routed, alone.routed, strict=True), 1):
        if ours[:-2] != wanted[:-2]:
            ties = [tie for tie in alone.ties if tie.step == step]
            assert ties, f"{where}: tokens per expert of step {step} differ, and no two scores are near each other"
            print(f"{where}: other counts, by {ties[0]}")
            return step - 1
    return STEPS


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
    routed = [float(n) for own in counts for n in own] + [0.0, 0.0]
    assert expert_tokens(routed, config) == {n: own for n, own in enumerate(counts) if any(own)}


def test_the_token_is_named_where_rounding_decides_which_expert_it_goes_to() -> None:
    ranked = torch.tensor([[0.9, 0.5, 0.1], [0.3, 0.4, 0.4 + 4e-6], [0.2, 0.9, 0.1]])
    (tie,) = ties_of(ranked, 1, step=2, layer=3, seq_len=2)
    assert str(tie) == "step 2, layer 3, row 0, position 1: two experts are 4.0e-06 apart"
    one = [(4.0, 2.0, 0.0, 0.0)] * STEPS
    alone, other = Seen(one, [], [], [], [tie]), [*one[:1], (3.0, 3.0, 0.0, 0.0), *one[2:]]
    assert same_steps("here", Seen(one, [], [], []), alone) == STEPS
    assert same_steps("here", Seen(other, [], [], []), alone) == 1
    with pytest.raises(AssertionError, match="step 1 differ, and no two scores"):
        same_steps("here", Seen([other[1], *one[1:]], [], [], []), alone)


class Copies(TorchDispatchMode):
    """Counts copies into tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.copy_.default
        return function(*args, **(kwargs or {}))


def counted() -> tuple[int, dict[tuple[str, str], Any]]:
    """On a rank: the copies that a step begins with, and the messages of a step."""
    config = config_of(Case(4), Layout(dp_replicate=2))
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    with Copies() as copies:
        engine._balance.begin(torch.tensor(0.25))  # type: ignore[attr-defined]
    layers = [block.mlp for block in engine.modules()[0].blocks().values()]  # type: ignore[operator]
    assert [float(layer.loss_factor) for layer in layers if isinstance(layer, SparseMlp)] == [0.25] * SPARSE
    rows = global_rows(config, 1)[mesh.dp_rank :: layout.dp]
    with Collectives(mesh) as collectives:
        engine.forward_backward(rows)
        engine.update(config.optim.lr)
    return copies.count, collectives.found


def test_a_step_begins_with_one_copy_and_sends_no_bias() -> None:
    for copies, messages in world.run(counted, 2):
        assert copies == 1, "of the factor of losses, for all layers"
        assert messages and not any(kind == "broadcast" for kind, _ in messages)
