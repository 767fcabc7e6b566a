"""The chunked loss against cross entropy of all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stoker.models.loss import Aim, Head, log_probabilities, summed_loss
from stoker.models.softmax import top_log_probabilities
from stoker.parallel.batch import IGNORE_INDEX
from stoker.parallel.objective import Targets, Teacher


def inputs(tokens: int, ignored: float = 0.3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 12, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(31, 12, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(31, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORE_INDEX
    return hidden, weight, labels


def whole_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden.double() @ weight.double().T, labels, ignore_index=IGNORE_INDEX, reduction="sum")


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 40), chunk=st.integers(1, 50), scale=st.floats(1e-3, 1e3))
def test_any_chunk_gives_the_loss_and_gradients_of_cross_entropy(tokens: int, chunk: int, scale: float) -> None:
    hidden, weight, labels = inputs(tokens, dtype=torch.float32)
    expected = whole_loss(hidden, weight, labels)
    wanted = torch.autograd.grad(expected * scale, (hidden, weight))
    loss = summed_loss(hidden, weight, Aim(labels), chunk)
    found = torch.autograd.grad(loss * scale, (hidden, weight))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale)


def test_bf16_loses_no_more_than_its_inputs_do() -> None:
    hidden, weight, labels = inputs(300, dtype=torch.bfloat16)
    wanted = torch.autograd.grad(whole_loss(hidden, weight, labels), (hidden, weight))
    loss = summed_loss(hidden, weight, Aim(labels), 64)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(whole_loss(hidden, weight, labels).item(), rel=1e-2)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b.double()).norm() / b.double().norm() < 1e-2


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 30),
    chunk=st.integers(1, 40),
    k=st.integers(1, 31),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    mix=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_distance_from_a_teacher_is_torchs_divergence(
    tokens: int, chunk: int, k: int, temperature: float, mix: float
) -> None:
    hidden, weight, labels = inputs(tokens, dtype=torch.float32)
    taught = torch.randn(1, tokens, 31).log_softmax(-1).topk(k)
    logits = hidden.double() @ weight.double().T
    softened = (taught.values[0].double() / temperature).softmax(-1)
    shares = torch.zeros_like(logits).scatter_(-1, taught.indices[0], softened)
    each = F.kl_div((logits / temperature).log_softmax(-1), shares, reduction="none").sum(-1)
    distance = temperature**2 * each[labels != IGNORE_INDEX].sum()
    expected = mix * distance + (1 - mix) * whole_loss(hidden, weight, labels)
    teacher = Teacher(taught.indices.int(), taught.values, temperature, mix)
    loss = summed_loss(hidden, weight, Aim(labels, teacher=teacher), chunk)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad(total, (hidden, weight)) for total in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert summed_loss(hidden, weight, Aim(labels, teacher=teacher), chunk) == loss


def test_of_equal_logits_the_smaller_token_is_the_more_probable() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, -1.0]])
    tokens, logs = top_log_probabilities(logits, 4, None)
    assert tokens.tolist() == [[1, 3, 2, 4]]
    torch.testing.assert_close(logs[0], logits.double().log_softmax(-1)[0, tokens[0]])


def test_no_valid_label_is_a_loss_of_zero_with_gradients_of_zero() -> None:
    hidden, weight, labels = inputs(20, ignored=1.1, dtype=torch.float32)
    loss = summed_loss(hidden, weight, Aim(labels), 8)
    loss.backward()
    assert loss.item() == 0.0
    for leaf in (hidden, weight):
        assert leaf.grad is not None and not leaf.grad.any()


def test_the_weight_gradient_of_many_tokens_does_not_overflow_fp16_when_it_is_scaled_down() -> None:
    hidden = torch.full((4096, 2), 40.0, dtype=torch.float16)
    weight = torch.zeros(4, 2, dtype=torch.float16, requires_grad=True)
    loss = summed_loss(hidden, weight, Aim(torch.zeros(4096, dtype=torch.int64)), 512)
    (loss / 4096).backward()
    assert weight.grad is not None
    assert weight.grad[0].tolist() == [-30.0, -30.0]


def test_without_gradients_only_the_loss_is_computed() -> None:
    hidden, weight, labels = inputs(30, dtype=torch.float32)
    expected = summed_loss(hidden, weight, Aim(labels), 8)
    with torch.no_grad():
        loss = summed_loss(hidden, weight, Aim(labels), 8)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, labels = inputs(30, dtype=torch.float32)
    summed_loss(hidden, weight.detach(), Aim(labels), 8).backward()
    assert hidden.grad is not None and weight.grad is None


def test_the_head_without_labels_gives_logits() -> None:
    hidden, weight, _ = inputs(5, dtype=torch.bfloat16)
    logits = Head(torch.nn.Parameter(weight), 8)(hidden)
    assert logits.shape == (5, 31) and logits.dtype == torch.float32


def test_weights_of_1_change_no_bit_of_loss_and_gradients() -> None:
    hidden, weight, labels = inputs(30, dtype=torch.float32)
    losses = [summed_loss(hidden, weight, Aim(labels, weights=weights), 8) for weights in (None, torch.ones(30))]
    first, second = ([loss, *torch.autograd.grad(loss, (hidden, weight))] for loss in losses)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_weights_are_factors_of_the_losses() -> None:
    hidden, weight, labels = inputs(30, dtype=torch.float32)
    weights = torch.linspace(0.0, 3.0, 30)
    logits = hidden.double() @ weight.double().T
    expected = (weights.double() * F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")).sum()
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = summed_loss(hidden, weight, Aim(labels, weights=weights), 8)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()
    with torch.no_grad():
        assert summed_loss(hidden, weight, Aim(labels, weights=weights), 8).item() == pytest.approx(
            loss.item(), rel=1e-6
        )


@pytest.mark.parametrize("ruled", [False, True])
def test_log_probabilities_have_any_gradient_for_each_token(ruled: bool) -> None:
    hidden, weight, labels = inputs(30, dtype=torch.float32)
    bias = torch.linspace(-1.0, 1.0, 31).requires_grad_()
    gradient = torch.linspace(-2.0, 2.0, 30)
    raw = hidden.double() @ weight.double().T + bias.double()
    logits = 5 * torch.tanh(raw / 5) if ruled else raw
    expected = -F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    wanted = torch.autograd.grad(expected, (hidden, weight, bias), gradient.double())
    rule = (lambda logits: 5 * torch.tanh(logits / 5)) if ruled else None
    found = log_probabilities(hidden, weight, labels, 8, bias=bias, rule=rule)
    assert found.dtype == torch.float32 and not found[labels == IGNORE_INDEX].any()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(found, (hidden, weight, bias), gradient), wanted, strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()
    with torch.no_grad():
        assert torch.equal(log_probabilities(hidden, weight, labels, 8, bias=bias, rule=rule), found)


def test_the_head_gives_what_targets_ask_for() -> None:
    hidden, weight, labels = inputs(12, dtype=torch.float32)
    head = Head(torch.nn.Parameter(weight.detach()), 8)
    weights = torch.arange(12.0)
    rows = labels.view(2, 6)
    assert torch.equal(head(hidden, Targets(rows)), head(hidden, rows))
    assert torch.equal(
        head(hidden, Targets(rows, weights.view(2, 6))),
        summed_loss(hidden, head.weight, Aim(labels, weights=weights), 8),
    )
    assert torch.equal(head(hidden, Targets(rows, per_token=True)), log_probabilities(hidden, head.weight, labels, 8))


@pytest.mark.parametrize("chunk", [7, 64])
def test_the_square_of_the_normalisers_logarithm_is_added_to_each_labels_loss(chunk: int) -> None:
    hidden, weight, labels = inputs(40, dtype=torch.float32)
    squares = (hidden.double() @ weight.double().T).logsumexp(-1)[labels != IGNORE_INDEX].square()
    expected = whole_loss(hidden, weight, labels) + 0.1 * squares.sum()
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = summed_loss(hidden, weight, Aim(labels, z_loss=0.1), chunk)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(summed_loss(hidden, weight, Aim(labels, z_loss=0.1), chunk), loss.detach())
    head = Head(torch.nn.Parameter(weight.detach()), chunk)
    training = head(hidden.detach(), Targets(labels, z_loss=0.1)).detach()
    assert training.item() > float(head.eval()(hidden.detach(), Targets(labels, z_loss=0.1)).detach()), (
        "evaluation leaves it out"
    )
