"""Attention inside documents by kernels for sequences of several lengths; here a plain one stands for torch's."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stoker.models import attention as attention_module
from stoker.models import document_attention
from stoker.models.attention import AttentionMask, attention, attention_context, document_mask
from stoker.models.document_attention import (
    attend_packed,
    attention_of_documents,
    packed_mask,
    takes,
    varlen_attention,
)
from stoker.parallel.documents import DocumentBounds, bounded, bounds_of, document_layers
from stoker.trainer.parallelize import _checkpoint_activations
from tests.models.plain_varlen import on_cpus, plain_kernel
from tests.models.tiny import decoder, rows, shape

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 14, [0] * 20, [3] * 19 + [4] * 1], dtype=torch.int32)


def heads(dtype: torch.dtype, channels: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 20, n, channels, generator=generator).to(dtype).requires_grad_() for n in (4, 2, 2)]


@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_packed_row_is_computed_as_under_the_mask_of_its_documents(scale: float | None) -> None:
    q, k, v = heads(torch.float32)
    bounds = bounds_of(DOCUMENTS)
    assert bounds is not None
    found = attend_packed(q, k, v, packed_mask(DOCUMENTS, bounds, plain_kernel), scale)
    wanted = attention(q, k, v, document_mask(DOCUMENTS, torch.float32), scale)
    gradient = torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), gradient) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_kernel_is_given_where_documents_begin_and_that_the_rest_have_no_tokens() -> None:
    mask = packed_mask(DOCUMENTS, DocumentBounds(8, 20), plain_kernel)
    ends = [20] * 5, [40] * 7, [60] * 6
    assert mask.starts.tolist() == [0, 5, 6, *ends[0], 20, *ends[1], 40, 59, *ends[2], 60]
    assert mask.starts.dtype == torch.int32 and mask.longest == 20


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 5))
def test_bounds_hold_and_lose_no_document(lengths: list[list[int]], first: int) -> None:
    width = max(map(sum, lengths))
    numbers = [np.repeat(np.arange(first, first + len(row)), row) for row in lengths]
    numbers = [np.pad(row, (0, width - len(row)), mode="edge") for row in numbers]
    documents = torch.from_numpy(np.stack(numbers).astype(np.int32))
    bounds = bounds_of(documents)
    assert bounds is not None
    mask = packed_mask(documents, bounds, plain_kernel)
    sizes = mask.starts.diff()
    assert (sizes >= 0).all() and sizes.max() <= bounds.longest <= width
    found = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in documents]
    assert [int(size) for size in sizes if size] == [size for row in found for size in row]


def test_numbers_are_rounded_up_so_that_steps_differ_little() -> None:
    documents = torch.arange(4096, dtype=torch.int32).div(300, rounding_mode="floor").int()[None]
    assert bounds_of(documents) == DocumentBounds(16, 512)
    assert bounds_of(torch.zeros(2, 4096, dtype=torch.int32)) == DocumentBounds(8, 4096)


def test_documents_whose_tokens_do_not_lie_together_have_no_bounds() -> None:
    assert bounds_of(torch.tensor([[0, 0, 1, 0]], dtype=torch.int32)) is None


def test_bounds_are_known_in_the_passes_of_their_rows_alone() -> None:
    layer = AttentionMask(16)
    (found,) = document_layers(torch.nn.Sequential(layer))
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    with suppress(KeyError), bounded([found], DOCUMENTS, gpu):
        assert layer.bounds == bounds_of(DOCUMENTS) is not None
        raise KeyError
    assert layer.bounds is None, "other rows have others, also after a failure"
    for documents, device in ((DOCUMENTS, cpu), (DOCUMENTS[:0], gpu)):
        with bounded([found], documents, device):
            assert layer.bounds is None
    with FakeTensorMode():
        there = torch.zeros(2, 8, dtype=torch.int32, device="cuda")
        with bounded([found], there, gpu):
            assert layer.bounds is None, "nothing waits for a device to count"


@pytest.mark.parametrize(
    ("channels", "dtype", "capability", "taken"),
    [
        (128, torch.bfloat16, (9, 0), True),
        (64, torch.float16, (8, 0), True),
        (256, torch.bfloat16, (9, 0), True),
        (192, torch.bfloat16, (8, 9), True),
        (256, torch.bfloat16, (8, 9), False),
        (256, torch.bfloat16, (12, 0), False),
        (264, torch.bfloat16, (9, 0), False),
        (100, torch.bfloat16, (9, 0), False),
        (128, torch.float32, (9, 0), False),
        (128, torch.float16, (7, 5), False),
        (128, torch.bfloat16, (13, 0), False),
    ],
)
def test_which_heads_the_kernels_take(channels, dtype, capability, taken) -> None:
    assert takes(channels, dtype, capability) is taken


@pytest.mark.parametrize("without", [None, "bounds", "channels", "dtype", "torch"])
def test_what_no_kernel_takes_is_left_to_flex_attention(without: str | None, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_module, "document_mask", lambda documents, dtype: "flex")
    monkeypatch.setattr(attention_module, "packed_mask", lambda documents, bounds, kernel: kernel)
    if without == "torch":
        monkeypatch.setattr(document_attention, "varlen_attention", lambda: None)
    layer = AttentionMask(100 if without == "channels" else 128)
    layer.bounds = None if without == "bounds" else DocumentBounds(8, 32)
    with FakeTensorMode():
        documents = torch.zeros(2, 32, dtype=torch.int32, device="cuda")
        mask = layer(documents.long(), documents, torch.float32 if without == "dtype" else torch.bfloat16)
    assert mask == "flex" if without else mask is varlen_attention() is not None


def test_a_layer_in_fp32_among_others_has_a_mask_of_its_own() -> None:
    q, k, v = heads(torch.float32)
    bounds = bounds_of(DOCUMENTS)
    assert bounds is not None
    found = attention(q, k, v, packed_mask(DOCUMENTS, bounds, plain_kernel))
    assert torch.equal(found, attention(q, k, v, document_mask(DOCUMENTS, torch.float32)))


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_checkpointing_keeps_the_output_of_the_kernel(mode: str, times: int, monkeypatch) -> None:
    """torch's own operation and its gradient, over a plain kernel for CPUs."""
    calls = on_cpus()
    config = shape()
    model = decoder(config).to(torch.bfloat16)
    tokens, positions, _ = rows(config)
    documents = torch.zeros_like(tokens, dtype=torch.int32)
    documents[:, 7:] = 1
    bounds = bounds_of(documents)
    assert bounds is not None
    wanted = model(tokens, positions, documents, tokens)
    wanted_gradients = torch.autograd.grad(wanted, list(model.parameters()))
    for block in model.blocks().values():
        _checkpoint_activations(block, mode, None)
    kernel = varlen_attention()
    monkeypatch.setattr(attention_module, "document_mask", lambda documents, _: packed_mask(documents, bounds, kernel))
    calls.clear()
    loss = model(tokens, positions, documents, tokens)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for found, other in zip(gradients, wanted_gradients, strict=True):
        assert found is not None and (found - other).norm() < 0.1 * other.norm(), "bf16 rounds by 3%"
    assert calls.count("forward") == times * len(model.blocks()) and calls.count("backward") == len(model.blocks())
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-3)


def test_flex_attention_is_kept_once_it_is_loaded() -> None:
    from torch._higher_order_ops.flex_attention import flex_attention

    assert flex_attention in attention_of_documents()


@pytest.mark.gpu
@pytest.mark.parametrize("grouped", [4, 2])
def test_on_a_gpu_both_ways_are_attention_by_the_book(grouped: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    q, k, v = heads(torch.bfloat16, 64)
    k, v = k[:, :, :grouped], v[:, :, :grouped]
    wanted = attention(q, k, v, document_mask(DOCUMENTS, torch.bfloat16)).detach()
    there, bounds = DOCUMENTS.cuda(), bounds_of(DOCUMENTS)
    kernel: Any = document_attention.packed_kernel(64, torch.bfloat16, there.device)
    assert bounds is not None and kernel is not None
    for mask in (packed_mask(there, bounds, kernel), document_mask(there, torch.bfloat16)):
        found = attention(q.cuda(), k.cuda(), v.cuda(), mask).cpu()
        assert (found.float() - wanted.float()).norm() < 1e-2 * wanted.float().norm()


@pytest.mark.long
def test_compiled_blocks_take_the_kernel_whole_and_once_for_documents_alike() -> None:
    on_cpus()
    torch._dynamo.reset()
    config = shape()
    model = decoder(config).to(torch.bfloat16)
    tokens, positions, _ = rows(config)
    kernel = varlen_attention()
    assert kernel is not None
    block, made = next(iter(model.blocks().values())), []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    compiled = torch.compile(block.forward, fullgraph=True, backend=counting)
    x = torch.randn(tokens.numel(), config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    for first in (5, 9):
        documents = (torch.arange(tokens.shape[1]) >= first).int().expand(tokens.shape).contiguous()
        bounds = bounds_of(documents)
        assert bounds is not None
        context = attention_context(config, positions, packed_mask(documents, bounds, kernel))
        torch.testing.assert_close(compiled(x, context), block(x, context), rtol=2e-2, atol=2e-2)
    assert len(made) == 1
