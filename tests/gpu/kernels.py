"""The step that compares kernels of attention and of the loss with the same by the book, and times them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stoker.models.attention import attention, document_mask
from stoker.models.document_attention import packed_kernel, packed_mask
from stoker.models.loss import Aim, summed_loss
from stoker.parallel.devices import attention_kernels, order_kernels, pick_device
from stoker.parallel.documents import bounds_of
from tests.gpu.steps import seconds
from tests.parallel.reference import normwise

HALF, FULL = 2e-2, 1e-5  # limits in bf16 and in fp32
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def by_the_book(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Softmax attention in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    allowed = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    scores = torch.einsum("rqhd,rkhd->rhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("rhqk,rkhd->rqhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


def _passes(q: Tensor, k: Tensor, v: Tensor, mask: Any, gradient: Tensor) -> list[Tensor]:
    """The output and the gradients of queries, keys and values."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, mask)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def attention_and_loss(device: str, _: Path) -> dict[str, Any]:
    """Each kernel of attention that a dtype has, both ways inside documents, and the loss, compiled and not."""
    place = pick_device(device, 0)
    order_kernels(place)
    on_gpu = place.type == "cuda"
    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    rows, length, heads, channels = (2, 1024, 16, 128) if on_gpu else (2, 48, 4, 16)
    shapes = [(rows, length, n, channels) for n in (heads, heads // 4, heads // 4, heads)]
    documents = (torch.arange(length) // (length // 3)).int().expand(rows, -1).contiguous()
    for name, dtype in DTYPES.items():
        q, k, v, gradient = (torch.randn(size, generator=generator).to(dtype).to(place) for size in shapes)
        limit = FULL if dtype == torch.float32 else HALF
        for kind, mask, kernels in _ways(q, documents):
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            book = by_the_book(*inputs, documents.to(place) if mask is not None else None)
            wanted = [book.detach(), *torch.autograd.grad(book, inputs, gradient.double())]
            with sdpa_kernel(kernels):
                try:
                    got = _passes(q, k, v, mask, gradient)
                except RuntimeError:
                    if mask is not None or len(kernels) > 1:
                        raise
                    found[f"{name} {kind}"] = "takes none of these"
                    continue
                took = seconds(lambda: _passes(q, k, v, mask, gradient), place)  # noqa: B023
            worst = max(normwise(own.cpu(), one.cpu()) for own, one in zip(got, wanted, strict=True))
            assert worst < limit, f"{kind}, {name}: differs from attention by the book by {worst:.1e}"
            found[f"{name} {kind}"] = {"differs": worst, "seconds": took}
    half = {name: value["seconds"] for name, value in found.items() if isinstance(value, dict) and "bf16" in name}
    fastest = ", ".join(name.removeprefix("bf16 ") for name in sorted(half, key=lambda name: half[name]))
    found |= _losses(place)
    if on_gpu:
        found["order"] = attention_kernels(torch.cuda.get_device_capability(place), torch.backends.cudnn.version())
    return {"summary": f"attention in bf16, the fastest first: {fastest}", **found}


def _ways(q: Tensor, documents: Tensor) -> list[tuple[str, Any, list[SDPBackend]]]:
    """Name, mask and allowed kernels of each way to attend, for `documents` on the host."""
    every = [getattr(SDPBackend, name) for name in attention_kernels((0, 0), None)]
    ways: list[tuple[str, Any, list[SDPBackend]]] = [("in order", None, every)]
    if q.is_cuda:
        ways += [(kernel.name, None, [kernel]) for kernel in every]
    there, bounds = documents.to(q.device), bounds_of(documents)
    kernel = packed_kernel(q.shape[-1], q.dtype, q.device)
    if kernel is not None and bounds is not None:
        ways.append(("documents, packed", packed_mask(there, bounds, kernel), every))
    return [*ways, ("documents, by blocks", document_mask(there, q.dtype), every)]


def _losses(place: torch.device) -> dict[str, Any]:
    """The loss and its gradients on the device, beside those on a CPU by kernels that are not compiled."""
    on_gpu, found = place.type == "cuda", {}
    tokens, width, vocabulary, chunk = (4096, 1024, 32_000, 2048) if on_gpu else (32, 8, 40, 16)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=generator) for n in (tokens, vocabulary))
    weight /= width**0.5
    labels = torch.randint(vocabulary, (tokens,), generator=generator)

    def passes(dtype: torch.dtype, where: torch.device, compiled: bool) -> list[Tensor]:
        inputs = [x.to(dtype).to(where).requires_grad_() for x in (hidden, weight)]
        loss = summed_loss(*inputs, Aim(labels.to(where), compiled=compiled), chunk)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    for name, dtype in DTYPES.items():
        wanted = passes(dtype, torch.device("cpu"), False)
        for compiled in (False, True) if on_gpu else (False,):  # it takes half a minute of a CPU
            got = passes(dtype, place, compiled)
            worst = max(normwise(own.cpu(), one) for own, one in zip(got, wanted, strict=True))
            kind = f"{name} loss, {'compiled' if compiled else 'eager'}"
            assert worst < (FULL if dtype == torch.float32 else HALF), f"{kind}: differs from a CPU's by {worst:.1e}"
            took = seconds(lambda: passes(dtype, place, compiled), place)  # noqa: B023
            found[kind] = {"differs": worst, "seconds": took}
    return found
