"""What a chunk of logits costs: passes over them, kernels that save some, and a chunk's size on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stoker.models import compiled_loss
from stoker.models.loss import Aim, Head, summed_loss
from stoker.models.loss_gradients import add_product, multiplies_into_fp32
from stoker.models.softmax import Softmax
from stoker.parallel.batch import IGNORE_INDEX

TOKENS, WIDTH, VOCABULARY = 40, 12, 31


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(TOKENS, WIDTH, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[::3] = IGNORE_INDEX
    return hidden, weight, labels


class Shared:
    """A vocabulary of which this rank holds the first tokens; ranks exchange nothing here."""

    def own(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        mine = tokens < VOCABULARY // 2
        return tokens.masked_fill(~mine, 0), mine


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("vocabulary", [None, Shared()], ids=["whole", "shared"])
def test_the_gradient_in_one_pass_is_that_of_two_bit_by_bit(dtype: torch.dtype, z_loss: float, vocabulary: Any) -> None:
    hidden, weight, labels = inputs(dtype)
    logits = (hidden @ weight.T).detach()[:, : VOCABULARY // 2 if vocabulary else VOCABULARY]
    log_sum = Softmax.of(logits, labels, vocabulary).log_sum + (0.7 if vocabulary else 0.0)
    wanted = Softmax.of(logits, labels, vocabulary).gradient(log_sum, z_loss).to(dtype)
    assert torch.equal(Softmax.of(logits, labels, vocabulary).rounded_gradient(log_sum, dtype, z_loss), wanted)


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def assert_like_the_old_head(dtype: torch.dtype, limit: float, **aims: Any) -> None:
    hidden, weight, labels = inputs(dtype)
    found = []
    for compiled in (False, True):
        loss = summed_loss(hidden, weight, Aim(labels, compiled=compiled, **aims), 16)
        found.append([loss.detach(), *torch.autograd.grad(loss, (hidden, weight))])
    for old, new in zip(*found, strict=True):
        assert (old.double() - new.double()).norm() <= limit * old.double().norm()


@pytest.mark.parametrize(
    "aims", [{}, {"z_loss": 0.1}, {"weights": torch.linspace(0.0, 2.0, TOKENS)}], ids=["plain", "z-loss", "weights"]
)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_the_formulas_of_the_compiled_loss_are_those_of_the_other(dtype, limit, aims, monkeypatch) -> None:
    monkeypatch.setattr(compiled_loss, "_compiled", as_it_is)
    assert_like_the_old_head(dtype, limit, **aims)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_is_the_other_and_two_kernels(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_like_the_old_head(dtype, 1e-6 if dtype == torch.float32 else 4e-3)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert made <= 4, f"{made} graphs for chunks of two lengths"


SMALL = "mm", "empty", "detach", "gather", "scatter_", "scatter_add_"  # products, and what touches a number a token


class Passes(TorchDispatchMode):
    """Bytes of tensors of the size of a chunk's logits that operations other than products read or write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._overloadpacket.__name__
        if not function.is_view and name not in SMALL:
            leaves = [x for x in tree_leaves((args, result)) if isinstance(x, Tensor)]
            size = sum(x.element_size() for x in leaves if tuple(x.shape) == (TOKENS, VOCABULARY))
            if size:
                self.bytes[name] = self.bytes.get(name, 0) + size
        return result


class OnGpu(Tensor):
    """On the CPU, and says that it is not."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize(("kind", "most"), [(Tensor, 30), (OnGpu, 22)])
def test_a_gpu_scales_and_rounds_the_gradient_in_one_pass(kind: type[Tensor], most: int) -> None:
    """Bytes of each logit in bf16, products apart. CPUs cast before the softmax: of these a GPU saves 8 more."""
    hidden, weight, labels = (x.detach() for x in inputs(torch.bfloat16))
    logits = (hidden @ weight.T).as_subclass(kind)
    with Passes() as passes:
        _, slopes = Aim(labels).losses_and_slopes(logits, slice(0, TOKENS), None, torch.bfloat16)
        slopes.to(torch.bfloat16)
    assert sum(passes.bytes.values()) == most, passes.bytes


def test_on_gpus_products_are_added_to_the_sum_in_one_kernel_where_torch_can(monkeypatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def addmm(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert out is total
        calls.append((a.dtype, out_dtype))
        return out.data.copy_(total + a.float() @ b.float())

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr("stoker.models.loss_gradients.multiplies_into_fp32", lambda device, dtype: True)
    a, b = torch.randn(5, 4).bfloat16(), torch.randn(4, 3).bfloat16()
    total = torch.ones(5, 3).as_subclass(OnGpu)
    add_product(total, a, b)
    assert calls == [(torch.bfloat16, torch.float32)]
    torch.testing.assert_close(total.as_subclass(Tensor), 1 + a.float() @ b.float())


def test_a_torch_without_such_a_product_is_found_out_and_does_without() -> None:
    multiplies_into_fp32.cache_clear()
    assert not multiplies_into_fp32(torch.device("cpu"), torch.bfloat16), "CPUs have none"
    multiplies_into_fp32.cache_clear()
    total = torch.ones(5, 3)
    add_product(total, torch.ones(5, 4).bfloat16(), torch.ones(4, 3).bfloat16())
    assert torch.equal(total, torch.full((5, 3), 5.0))


def test_a_head_takes_1024_tokens_unless_it_is_told_otherwise() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 2))
    assert Head(weight).chunk == Head(weight, None).chunk == 1024 and Head(weight, 7).chunk == 7


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_of_a_gpu_computes_what_that_of_a_cpu_computes(dtype: torch.dtype, compiled: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    hidden, weight, labels = inputs(dtype)
    loss = summed_loss(hidden, weight, Aim(labels), 16)
    wanted = [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]
    there = [x.detach().cuda().requires_grad_() for x in (hidden, weight)]
    loss = summed_loss(*there, Aim(labels.cuda(), compiled=compiled), 16)
    for old, new in zip(wanted, [loss.detach(), *torch.autograd.grad(loss, there)], strict=True):
        assert (old.double() - new.cpu().double()).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * old.norm()
