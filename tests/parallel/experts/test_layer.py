"""The stacked experts against a loop over experts, written plainly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stoker.parallel.experts import Experts

NUM, WIDTH, HIDDEN, TOKENS, K = 6, 16, 24, 40, 2


def plainly(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
            out[token] = out[token] + weight * (experts.down_proj[expert] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("least", [0, 2, NUM - K], ids=["all", "two without a token", "two for all tokens"])
def test_results_and_gradients_are_those_of_a_loop(least: int) -> None:
    torch.manual_seed(0)
    experts = Experts(NUM, WIDTH, HIDDEN)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    chosen = torch.stack([least + torch.randperm(NUM - least)[:K] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, K, requires_grad=True)
    tensors = [x, weights, *experts.parameters()]
    push = torch.randn(TOKENS, WIDTH)
    found = []
    for compute in (experts, lambda *given: plainly(experts, *given)):
        out = compute(x, chosen, weights)
        found.append([out, *torch.autograd.grad((out * push).sum(), tensors)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_no_tokens_have_results_and_gradients_of_zero() -> None:
    experts = Experts(NUM, WIDTH, HIDDEN)
    out = experts(torch.zeros(0, WIDTH), torch.zeros(0, K, dtype=torch.int64), torch.zeros(0, K))
    out.sum().backward()
    assert out.shape == (0, WIDTH) and all(not p.grad.any() for p in experts.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in experts.parameters())
