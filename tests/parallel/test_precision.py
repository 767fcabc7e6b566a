"""Compute in fewer bits: how far layouts may differ then, the loss scale of fp16, fp32 modules, and offload."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn

from stoker.conf.schema import Config, ModelConfig
from stoker.launch.check import LIMITS, Limits
from stoker.models.family import build_on_meta
from stoker.parallel.fp32_modules import compute_in_fp32
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.loss_scale import BACKOFF, FIRST, FLOOR, GROWS_AFTER, GROWTH, LossScale
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.model import whole_model
from stoker.parallel.replicated import ReplicatedStrategy
from stoker.parallel.sharded import ShardedStrategy
from stoker.parallel.sharding import Precision
from stoker.parallel.shards import GRADIENT
from stoker.parallel.update import StepMetrics
from stoker.trainer.parallelize import cut
from tests import world
from tests.extent import some
from tests.parallel.parity import Case, Measured, train
from tests.parallel.reference import VOCABULARY, assemble, global_rows, normwise, one_process, small_config

LAYOUTS = [
    Layout(2),
    Layout(1, 2, zero=3),
    Layout(tp=2),
    Layout(pp=2),
    Layout(1, 2, 2, 1, 2),
    Layout(1, 1, 2, 2),
]


@dataclass(frozen=True)
class Rounding:
    """Relative differences that rounding explains: of a loss, of the first step's gradient norm, of a gradient."""

    loss: float
    grad_norm: float
    gradient: float


ROUNDING = {"bf16": Rounding(2e-2, 5e-3, 2e-2), "fp16": Rounding(5e-3, 1e-3, 5e-3)}


def test_check_applies_the_limits_that_these_layouts_keep() -> None:
    for precision, rounding in ROUNDING.items():
        limits = LIMITS[precision]
        assert (limits.loss, limits.grad_norm, limits.gradient) == (
            rounding.loss,
            rounding.grad_norm,
            rounding.gradient,
        )
    assert LIMITS["fp32"] == Limits(loss=1e-5, grad_norm=1e-5, gradient=1e-5, parameter=1e-4)


def in_precision(layout: Layout, precision: str) -> Config:
    config = Case(4, tied=True).config(layout)
    config.precision = precision
    return config


@cache
def on_one_rank(precision: str) -> Measured:
    return world.run(train, 1, [in_precision(Layout(), precision)])[0][0]


REDUCED = [(layout, precision) for layout in LAYOUTS for precision in ("bf16", "fp16")]


@pytest.mark.long
@pytest.mark.parametrize(("layout", "precision"), some(REDUCED, 3), ids=str)
def test_layouts_differ_by_no_more_than_rounding_explains(layout: Layout, precision: str) -> None:
    """Ten steps with AdamW."""
    limits, one = ROUNDING[precision], on_one_rank(precision)
    ranks: list[Measured] = [found[0] for found in world.run(train, layout.world, [in_precision(layout, precision)])]
    assert ranks[0].trace.losses == pytest.approx(one.trace.losses, rel=limits.loss)
    assert ranks[0].trace.norms[0] == pytest.approx(one.trace.norms[0], rel=limits.grad_norm)
    gradients, theirs = assemble([one.gradients], GRADIENT), assemble([r.gradients for r in ranks], GRADIENT)
    for name, value in gradients.items():
        assert normwise(theirs[name], value) < limits.gradient, name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fewer_bits_stay_near_fp32(precision: str) -> None:
    found = on_one_rank(precision)
    expected = one_process(in_precision(Layout(), "fp32"), 10)
    assert found.trace.losses == pytest.approx(expected.losses, rel=0.02)


def test_the_loss_scale_halves_on_overflow_down_to_its_floor_and_grows_after_enough_updates() -> None:
    scale = LossScale(torch.device("cpu"))
    skipped, updated = torch.ones(()), torch.zeros(())
    scale.adjust(skipped, skipped)
    assert scale.value == FIRST * BACKOFF
    scale.adjust(updated, skipped)  # a spike: it does not change the scale
    assert scale.value == FIRST * BACKOFF
    for _ in range(GROWS_AFTER - 1):
        scale.adjust(updated, updated)
    assert scale.value == FIRST * BACKOFF
    kept = scale.state()
    scale.adjust(updated, updated)
    assert scale.value == FIRST * BACKOFF * GROWTH
    again = LossScale(torch.device("cpu"))
    again.load_state(kept)
    again.adjust(updated, updated)
    assert again.value == scale.value, "the count of updates travels in the state"
    for _ in range(100):
        scale.adjust(skipped, skipped)
    assert scale.value == FLOOR
    scale.load_state({})
    assert scale.value == FIRST


TOO_LARGE = 2.0**40  # a loss scale


def overflowing(layout: Layout) -> tuple[list[StepMetrics], dict[str, float], bool]:
    """fp16 with a scale far too large, until it fits. Are the parameters untouched as long as it does not?"""
    config = in_precision(layout, "fp16")
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    engine.load_state({"step": 0.0, "loss_scale": TOO_LARGE})
    rows = global_rows(config, 1)[mesh.dp_rank :: layout.dp]
    if mesh.dp_rank != 0:  # no labels: only the other half of the ranks overflows
        rows.labels.fill_(-100)
    initial = [shard.data.clone() for shard in engine.shards()]
    results, untouched = [], True
    while not results or results[-1].skipped:
        engine.forward_backward(rows)
        results.append(engine.update(1e-3).read())
        same = all(torch.equal(s.data, value) for s, value in zip(engine.shards(), initial, strict=True))
        untouched &= same == results[-1].skipped
    return results, engine.state(), untouched


@pytest.mark.long
@pytest.mark.parametrize(
    "layout", [Layout(2), Layout(1, 2, zero=2), Layout(1, 2, 2, 1, 3), Layout(2, 1, 1, 2)], ids=str
)
def test_an_overflow_on_some_ranks_is_skipped_by_all_and_lowers_their_scale(layout: Layout) -> None:
    ranks = world.run(overflowing, layout.world, layout)
    results, state, _ = ranks[0]
    assert len(results) > 10 and all(result.overflowed for result in results[:-1]) and not results[-1].overflowed
    assert [result.loss_scale for result in results] == [TOO_LARGE * BACKOFF**n for n in range(len(results))]
    assert state == {"step": 1.0, "loss_scale": results[-1].loss_scale, "loss_scale_updates": 1.0}
    for other, their_state, untouched in ranks:
        assert untouched and their_state == state
        assert [result.skipped for result in other] == [result.skipped for result in results]


def test_at_the_floor_a_step_that_is_not_finite_counts_as_bad() -> None:
    (results,) = world.run(at_the_floor, 1)
    assert results.skipped and not results.overflowed


def at_the_floor() -> StepMetrics:
    config = in_precision(Layout(), "fp16")
    mesh = mesh_over_default_group(Layout(), torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, Layout()))
    engine.load_state({"step": 0.0, "loss_scale": FLOOR})
    engine.shards()[0].data.fill_(float("nan"))
    engine.shards_written()
    engine.forward_backward(global_rows(config, 1))
    return engine.update(1e-3).read()


DECODER = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)


def dtypes(zero: int, patterns: list[str]) -> dict[str, tuple[torch.dtype, torch.dtype, torch.dtype]]:
    """On a rank, in bf16: the dtypes of the input, the weight and the output of every linear layer in a forward."""
    layout = Layout(1, dist.get_world_size(), zero=zero) if zero else Layout(dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    model = build_on_meta(DECODER, whole_model(2))
    precision = Precision(torch.bfloat16, compute_in_fp32(model, patterns, torch.bfloat16))
    if zero:
        ShardedStrategy(model, mesh, precision, zero)
    else:
        ReplicatedStrategy(model, mesh.device, precision, mesh.group("dp_replicate"))
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name in ("embedding", "head"):

            def see(module: nn.Module, inputs: tuple, output: torch.Tensor, name: str = name) -> None:
                found[name] = (inputs[0].dtype, module.weight.dtype, output.dtype)

            module.register_forward_hook(see, prepend=True)  # before a unit frees its gathered weight
    for parameter in model.parameters():
        parameter.data.zero_()
    rows = global_rows(small_config(), 1)
    loss = model(rows.tokens, rows.positions, rows.documents, rows.labels)
    loss.backward()
    return found


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_chosen_modules_compute_in_fp32_and_the_rest_does_not(zero: int) -> None:
    full, half = torch.float32, torch.bfloat16
    for seen in world.run(dtypes, 2, zero, ["layers.1", "layers.*.mlp.down", "head"]):
        assert seen["layers.0.attention.q"] == (half, half, half)
        assert seen["layers.0.mlp.up"] == (half, half, half)
        assert seen["layers.0.mlp.down"][:2] == (full, full)
        assert seen["layers.1.attention.q"] == (full, full, full)
        assert seen["layers.1.mlp.down"] == (full, full, full)
        assert seen["head"][:2] == (full, full)
        assert seen["embedding"][1:] == (half, half)


def test_a_parameter_that_is_shared_with_a_module_in_fewer_bits_is_refused() -> None:
    model = build_on_meta(replace(DECODER, tie_word_embeddings=True), whole_model(2))
    with pytest.raises(ValueError, match=r"embedding.*head|head.*embedding"):
        compute_in_fp32(model, ["head"], torch.bfloat16)


@pytest.mark.long
@pytest.mark.parametrize("layout", [Layout(2), Layout(1, 2, zero=1), Layout(1, 2, 2, 1, 3), Layout(pp=2)], ids=str)
def test_fp32_modules_compute_the_same_on_every_layout(layout: Layout) -> None:
    def config(layout: Layout) -> Config:
        config = in_precision(layout, "bf16")
        config.fp32_modules = ["embedding", "layers.*", "head"]
        return config

    one = world.run(train, 1, [config(Layout())])[0][0]
    ranks = [found[0] for found in world.run(train, layout.world, [config(layout)])]
    assert ranks[0].trace.losses == pytest.approx(one.trace.losses, rel=ROUNDING["bf16"].loss)
    gradients, theirs = assemble([one.gradients], GRADIENT), assemble([r.gradients for r in ranks], GRADIENT)
    for name, value in gradients.items():
        assert normwise(theirs[name], value) < ROUNDING["bf16"].gradient, name


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_block_with_units_inside_is_recomputed_selectively(zero: int) -> None:
    kept, again = in_precision(Layout(1, 2, zero=zero), "bf16"), in_precision(Layout(1, 2, zero=zero), "bf16")
    again.activation_checkpointing = "selective"
    for config in (kept, again):
        config.fp32_modules = ["*.attention_norm"]  # each is a unit of `fully_shard`
    for one, other in world.run(train, 2, [kept, again]):
        assert one.trace == other.trace
        for a, b in zip(one.parameters, other.parameters, strict=True):
            assert torch.equal(a.data, b.data), a.name


OFFLOADED = [Layout(), Layout(2), *(Layout(1, 2, zero=z) for z in (1, 2, 3)), Layout(1, 1, 2, 2)]
BOTH = [(layout, precision) for precision in ("fp32", "bf16") for layout in OFFLOADED]


# Of both precisions and six layouts every second pair, so that each occurs
@pytest.mark.long
@pytest.mark.parametrize(("layout", "precision"), some(BOTH, 3), ids=str)
def test_offloaded_weights_compute_the_same_to_the_last_bit(layout: Layout, precision: str) -> None:
    here, away = in_precision(layout, precision), in_precision(layout, precision)
    away.parallel.offload = "cpu"
    for stayed, left in world.run(train, layout.world, [here, away]):
        assert stayed.trace == left.trace
        for one, other in zip(stayed.parameters, left.parameters, strict=True):
            assert torch.equal(one.data, other.data), one.name
