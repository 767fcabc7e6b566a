"""Experts in the decoder: what a token costs, and how they start."""

from __future__ import annotations

import torch

from stoker.models.decoder import build
from stoker.models.experts import Router
from stoker.models.family import build_on_meta
from stoker.models.feed_forward import idle_parameters
from stoker.models.flops import flops_per_token
from stoker.parallel.model import Normal, whole_model
from tests.models.tiny import decoder, shape

SPARSE = {"num_experts": 6, "moe_intermediate_size": 24, "num_shared_experts": 1, "first_dense_layers": 1}


def test_only_the_experts_that_a_token_uses_count_in_its_arithmetic() -> None:
    config = shape(**SPARSE)
    model = build_on_meta(config, whole_model(3))
    every = sum(parameter.numel() for parameter in model.parameters())
    assert idle_parameters(config) == 2 * (6 - 2) * 3 * 32 * 24
    used = shape(**(SPARSE | {"num_experts": 2}))  # as many as a token uses
    fewer = sum(parameter.numel() for parameter in build_on_meta(used, whole_model(3)).parameters())
    routers = 2 * (6 - 2) * 32
    assert flops_per_token(config, 64, every) == flops_per_token(used, 64, fewer) + 6 * routers


def test_a_layer_costs_what_its_tokens_compute() -> None:
    config = shape(**SPARSE)
    dense, sparse, _ = build_on_meta(config, whole_model(3)).blocks().values()  # type: ignore[operator]
    assert build.layer_cost(config, dense) == sum(p.numel() for p in dense.parameters())
    idle = (6 - 2) * 3 * 32 * 24
    assert build.layer_cost(config, sparse) == sum(p.numel() for p in sparse.parameters()) - idle


def test_projections_of_experts_into_the_stream_start_smaller() -> None:
    model = decoder(shape(**SPARSE))
    small, usual = (Normal(0.2 / (2 * 3) ** 0.5), Normal(0.2))
    rules = {name: model.initial(name) for name, _ in model.named_parameters()}
    assert rules["layers.1.mlp.experts.down_proj"] == rules["layers.1.mlp.shared.down.weight"] == small
    assert rules["layers.1.mlp.experts.gate_up_proj"] == rules["layers.1.mlp.router.weight"] == usual


def test_a_router_computes_in_float32() -> None:
    router = Router(shape(**SPARSE))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    chosen, weights, _, _ = router.bfloat16()(x)
    exact = (x.double() @ router.weight.double().T).softmax(-1).topk(2, -1)
    assert torch.equal(chosen, exact.indices) and weights.dtype == torch.float32
    wanted = exact.values / exact.values.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-5, atol=1e-6)
