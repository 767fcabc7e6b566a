"""Attention inside documents on GPUs by kernels for sequences of several lengths, where torch has them.

FlexAttention, which does it elsewhere, masks pairs of tokens in blocks; these kernels are given where documents begin,
compute no pair that is masked, and are FlashAttention itself (Dao 2023, FlashAttention-2). Their output is one that
selective activation checkpointing keeps.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stoker.parallel.documents import DocumentBounds

DTYPES = torch.float16, torch.bfloat16
UNIT, WIDEST = 8, 256  # channels of a head
OLDEST, NEWEST = (8, 0), (12, 1)  # compute capabilities that the kernels are made for
SMALL, WIDEST_IN_SMALL = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1)), 192  # with too little memory on chip for backward


@dataclass(frozen=True)
class PackedMask:
    """Causal attention inside documents: `starts` are the numbers of their first tokens among those of all rows.

    int32 `[rows x most + 1]`, rising: what a row has fewer than `most` are documents without tokens at its end, and the
    last is the number of all tokens.
    """

    documents: Tensor  # int32 [rows, seq_len]
    starts: Tensor
    longest: int  # tokens of a document, at most
    kernel: Callable[..., Tensor]  # torch's `varlen_attn`


def packed_mask(documents: Tensor, bounds: DocumentBounds, kernel: Callable[..., Tensor]) -> PackedMask:
    """Of `documents` (int32 `[rows, seq_len]`) for which `bounds` hold. Nothing waits for the device."""
    rows, length = documents.shape
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    places = torch.arange(length, dtype=torch.int32, device=documents.device)
    starts = torch.where(begins, places, length).sort(1).values[:, : bounds.most]
    starts = starts + torch.arange(rows, dtype=torch.int32, device=documents.device)[:, None] * length
    end = torch.full((1,), rows * length, dtype=torch.int32, device=documents.device)
    return PackedMask(documents, torch.cat([starts.flatten().int(), end]), bounds.longest, kernel)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, mask: PackedMask, scale: float | None) -> Tensor:
    """`stoker.models.attention.attention` in one of DTYPES."""
    out = mask.kernel(
        *(x.flatten(0, 1) for x in (q, k, v)),
        mask.starts,
        mask.starts,
        mask.longest,
        mask.longest,
        scale=scale,
        window_size=(-1, 0),  # all before, nothing after: causal
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.view(q.shape)


def packed_kernel(channels: int, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor] | None:
    """The kernel for heads of so many `channels`, or None where there is none on this `device`."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return varlen_attention() if takes(channels, dtype, torch.cuda.get_device_capability(device)) else None


def takes(channels: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether the kernels, forward and backward, take such heads on a GPU of this compute `capability`."""
    widest = WIDEST_IN_SMALL if capability in SMALL else WIDEST
    return dtype in DTYPES and OLDEST <= capability <= NEWEST and channels % UNIT == 0 and channels <= widest


@functools.cache
def varlen_attention() -> Callable[..., Tensor] | None:
    """torch's, if it has one that is causal by a window and takes grouped queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    found: Any = varlen_attn  # of a tensor, unless it is asked for more
    known = inspect.signature(found).parameters
    return found if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


def attention_of_documents() -> set[Any]:
    """The operations of this kernel and of FlexAttention, compiled or to be, as far as they are loaded."""
    found: set[Any] = set()
    if "torch.nn.attention.varlen" in sys.modules:
        found.add(torch.ops.torch_attn._varlen_attn.default)
    if "torch._higher_order_ops.flex_attention" in sys.modules:
        from torch._higher_order_ops.flex_attention import flex_attention

        found.add(flex_attention)
        compiled = getattr(sys.modules.get("torch._higher_order_ops.wrap"), "inductor_compiled_code", None)
        found |= {compiled} - {None}
    return found
