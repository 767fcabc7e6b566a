"""precision=fp8: what is rounded and what is not, how far layouts and bf16 are away, and what is refused."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from stoker.conf.schema import Config, Float8Config, ModelConfig
from stoker.models.family import build_on_meta
from stoker.parallel.layout import Layout
from stoker.parallel.model import whole_model
from stoker.parallel.shards import GRADIENT
from stoker.parallel.tensor import float8
from stoker.parallel.tensor.layers import ColumnLinear
from stoker.trainer.parallelize import part_builder
from tests import world
from tests.extent import some
from tests.parallel.parity import Case, Measured, train
from tests.parallel.reference import VOCABULARY, assemble, normwise

FLOOR = 1e-12


def in_float8(layout: Layout, precision: str = "fp8", **parallel: object) -> Config:
    """Wide enough that a rank's share of every layer is a multiple of 16 features."""
    config = Case(4).config(layout)
    config.model = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
    )
    config.precision = precision
    for key, value in parallel.items():
        setattr(config.parallel, key, value)
    return config


def layer(features_in: int = 32, features_out: int = 48) -> ColumnLinear:
    torch.manual_seed(1)
    made = ColumnLinear(features_in, features_out, bias=True).to(torch.bfloat16)
    setattr(made, float8.SLOT, float8.Float8(FLOOR))
    return made


def test_rows_are_rounded_to_three_bits_of_mantissa_by_scales_that_are_powers_of_two() -> None:
    matrix = torch.randn(64, 128) * torch.logspace(-8, 8, 64)[:, None]
    values, scales = float8.rounded(matrix, FLOOR)
    assert values.dtype is torch.float8_e4m3fn and scales.shape == (64, 1)
    assert torch.equal(scales, torch.exp2(scales.log2().round()))
    largest = (matrix.abs().amax(1, keepdim=True) / scales).squeeze()
    assert bool(((largest > 224) & (largest <= 448)).all()), "more of the range than half is used, and no more than all"
    error = (values.float() * scales - matrix).abs()
    assert bool((error <= torch.maximum(matrix.abs() * 2**-4, scales * 2**-10)).all())


def test_zeros_have_the_floor_s_scale_and_what_is_not_finite_stays_so() -> None:
    values, scales = float8.rounded(torch.zeros(2, 16), 1e-3)
    assert bool((values.float() == 0).all()) and bool((scales > 1e-3 / 448 / 2).all())
    made, x = layer(), torch.ones(3, 32).to(torch.bfloat16)
    x[1, 5], x[2, 7] = float("inf"), float("nan")
    assert made(x).isfinite().all(1).tolist() == [True, False, False]


def test_the_product_is_that_of_the_rounded_operands_and_the_weight_s_gradient_is_not_rounded() -> None:
    made = layer()
    x = torch.randn(2, 20, 32).to(torch.bfloat16).requires_grad_()
    gradient = torch.randn(2, 20, 48).to(torch.bfloat16)
    result = made(x)
    result.backward(gradient)

    def back(matrix: torch.Tensor) -> torch.Tensor:
        values, scales = float8.rounded(matrix, FLOOR)
        return values.double() * scales.double()

    assert made.bias is not None and made.weight.grad is not None and x.grad is not None
    exact = back(x.detach().flatten(0, 1)) @ back(made.weight.detach()).t() + made.bias.double()
    torch.testing.assert_close(result.detach().flatten(0, 1).double(), exact, rtol=2**-7, atol=1e-2)
    unrounded = x.detach() @ made.weight.detach().t() + made.bias.detach()
    assert normwise(result.detach(), unrounded) > 1e-2, "nothing was rounded"
    flat = gradient.flatten(0, 1)
    assert torch.equal(made.weight.grad, flat.t() @ x.detach().flatten(0, 1))
    assert torch.equal(made.bias.grad, gradient.sum((0, 1))) if made.bias.grad is not None else False
    of_x = back(flat) @ back(made.weight.detach().t()).t()
    torch.testing.assert_close(x.grad.flatten(0, 1).double(), of_x, rtol=2**-7, atol=1e-2)


def test_a_token_depends_on_no_other() -> None:
    made, x = layer(), torch.randn(8, 32).to(torch.bfloat16)
    louder = x.clone()
    louder[3] *= 1000
    rows = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(made(x)[rows], made(louder)[rows])


def test_linear_layers_of_blocks_compute_in_float8_but_those_that_are_filtered_or_odd() -> None:
    def chosen(config: Config) -> set[str]:
        model = part_builder(config)(whole_model(config.model.num_hidden_layers))
        return {name for name, module in model.named_modules() if float8.float8_of(module) is not None}

    config = in_float8(Layout())
    every = chosen(config)
    assert len(every) == 2 * 7 and all(name.startswith("layers.") for name in every)
    config.fp8 = Float8Config(filter_fqns=["layers.0.*", "o_proj"])
    assert chosen(config) == {name for name in every if name.startswith("layers.1.") and not name.endswith(".o")}
    config.fp8 = Float8Config()
    config.model.intermediate_size = 100
    assert len(chosen(config)) == 2 * 4, "a layer with 100 features"
    config.precision = "bf16"
    assert chosen(config) == set()


@cache
def one_rank(precision: str = "fp8") -> Measured:
    return world.run(train, 1, [in_float8(Layout(), precision)])[0][0]


LAYOUTS = [
    (Layout(tp=2), "fsdp"),
    (Layout(1, 2, zero=3), "fsdp"),
    (Layout(pp=2), "fsdp"),
    (Layout(2), "fsdp"),
    (Layout(1, 2, zero=1), "deepspeed"),
    (Layout(1, 2, zero=3), "deepspeed"),
    (Layout(1, 2, 2, 1, 2), "fsdp"),
    (Layout(1, 1, 2, 2), "fsdp"),
]


@pytest.mark.parametrize(("layout", "engine"), some(LAYOUTS, 4), ids=str)
def test_layouts_differ_by_no_more_than_rounding_explains(layout: Layout, engine: str) -> None:
    """The bounds that docs/gpus.md gives."""
    one, fresh = one_rank(), engine == "deepspeed"
    configs = [in_float8(layout, engine=engine)]
    ranks: list[Measured] = [found[0] for found in world.run(train, layout.world, configs, fresh=fresh)]
    assert ranks[0].trace.losses == pytest.approx(one.trace.losses, rel=2e-2)
    assert ranks[0].trace.norms[0] == pytest.approx(one.trace.norms[0], rel=2e-2)
    gradients, theirs = assemble([one.gradients], GRADIENT), assemble([r.gradients for r in ranks], GRADIENT)
    for name, value in gradients.items():
        assert normwise(theirs[name], value) < 6e-2, name


def test_the_same_layout_twice_is_bitwise_equal_and_near_bf16() -> None:
    again = world.run(train, 1, [in_float8(Layout())])[0][0]
    assert again.trace == one_rank().trace
    theirs = one_rank("bf16").trace
    assert again.trace != theirs
    assert again.trace.losses[0] == pytest.approx(theirs.losses[0], rel=1e-3)


def test_a_share_that_kernels_cannot_take_is_refused_by_the_layer_s_name() -> None:
    config = in_float8(Layout(tp=2))
    config.model.intermediate_size = 80
    with pytest.raises(AssertionError, match=r"mlp.*precision=fp8 with 40 features a rank.*fp8.filter_fqns"):
        world.run(train, 2, [config])


def test_a_model_without_such_layers_and_a_gpu_without_float8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = in_float8(Layout())
    config.fp8 = Float8Config(filter_fqns=["*"])
    with pytest.raises(AssertionError, match="no linear layer in its blocks that can compute in float8"):
        world.run(train, 1, [config])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"NVIDIA A100-SXM4-80GB has no float8.*precision=bf16 works"):
        float8.refuse_device(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    float8.refuse_device(torch.device("cuda", 0))


def test_weights_are_stored_as_in_bf16() -> None:
    model = build_on_meta(in_float8(Layout()).model, whole_model(2))
    before = {name: (value.shape, value.dtype) for name, value in model.named_parameters()}
    made = part_builder(in_float8(Layout()))(whole_model(2))
    assert {name: (value.shape, value.dtype) for name, value in made.named_parameters()} == before
