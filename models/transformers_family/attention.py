"""Attention of transformers' models: one function for all of them, and masks made from documents.

Both are registered with transformers under the name `stoker`. A model says by its own mask rule which keys a query may
see (causal, a window, chunks); Stoker adds that they are of the same document. Positions and padding decide nothing.
Classes that compute attention in code of their own (Bloom, MPT, Falcon) get the same masks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stoker.models.gathered_attention import Places, attend_to_all, rank_order
from stoker.parallel.sequence import SequenceAxis

ATTENTION = EXPERTS = "stoker"  # their names in transformers' registries

_documents: Tensor | None = None  # of the forward pass that runs now, int32 [rows, tokens]
_called: Callable[[], None] | None = None
_places: Places | None = None  # of its tokens, where ranks share sequences
AXIS = "stoker_sequence"  # attribute of a module whose ranks share sequences: its axis

# Keyword arguments of layers that reach the function and mean nothing to it
_WITHOUT_MEANING = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
    "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch",
    "output_router_logits", "head_mask", "layer_idx",
}  # fmt: skip


@functools.cache
def registered() -> None:
    """Register attention, masks and experts with transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, compute_experts)
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, additive_mask)


@contextlib.contextmanager
def masks_of_documents(
    documents: Tensor | None, called: Callable[[], None] | None = None, places: Places | None = None
) -> Iterator[None]:
    """Masks that transformers' models make in here keep attention inside `documents`, int32 `[rows, tokens]`.

    `called` is called at each use of `attend`. Where ranks share sequences, the masks are of this rank's queries by the
    keys of all ranks, rank after rank, at their `places`.
    """
    from transformers import masking_utils

    global _documents, _called, _places
    before = _documents, _called, _places
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    eager, packed = masks["eager"], masking_utils.find_packed_sequence_indices
    masks["eager"] = additive_mask  # for classes with attention of their own
    # transformers would infer documents from positions that start again, which it cannot do on the meta device
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    _documents, _called, _places = documents, called, places
    try:
        yield
    finally:
        masks["eager"], masking_utils.find_packed_sequence_indices = eager, packed
        _documents, _called, _places = before


def compute_experts(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """transformers' grouped matrix products; on the meta device, where they take bf16 only, its batched ones."""
    from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

    forward = batched_mm_experts_forward if hidden.is_meta else grouped_mm_experts_forward
    return forward(module, hidden, index, weights)


def additive_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """transformers' mask interface: what is added to the scores, `[rows or 1, 1, queries, keys]`.

    None where `attend` is causal by itself. Raises ValueError for a padding mask, and for a rule that transformers
    does not write as arithmetic on positions.
    """
    if attention_mask is not None or use_vmap:
        raise ValueError("attention by a padding mask, or by a mask rule of the model's own, is not supported")
    assert mask_function is not None
    if _places is not None:
        zero = torch.zeros((), dtype=torch.int64, device=device)
        seen, keys = _places.own[:, :, None], _places.every[:, None]
        return _added(mask_function(zero, zero, seen, keys) & (keys >= _places.first[:, :, None]), dtype)
    whole = local_size is None or local_size >= kv_length
    plain = getattr(mask_function, "__name__", "") == "causal_mask_function" or local_size is not None
    if (
        _documents is None
        and whole
        and plain
        and allow_is_causal_skip
        and q_length == kv_length
        and not _is_eager(config)
    ):
        return None
    queries = torch.arange(q_length, device=device)[:, None] + q_offset
    keys = torch.arange(kv_length, device=device)[None, :] + kv_offset
    zero = torch.zeros((), dtype=torch.int64, device=device)
    allowed = mask_function(zero, zero, queries, keys)[None]
    if _documents is not None:
        allowed = allowed & (_documents[:, :, None] == _documents[:, None, :])
    return _added(allowed, dtype)


def _added(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, from which queries see which keys: bool `[rows, queries, keys]`."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def _is_eager(config: Any) -> bool:
    """Whether the class computes attention itself, and so needs its mask in any case."""
    return getattr(config, "_attn_implementation", ATTENTION) != ATTENTION or config.model_type in ("bloom", "mpt")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `[rows, heads, tokens, head_dim]` to `[rows, tokens, heads, head_dim]`.

    Of this rank's tokens where ranks share sequences (the attribute AXIS of `module`).

    `key` and `value` have as many heads as this rank holds. `softcap` bounds the scores, `s_aux` (`[heads]`) are sinks:
    scores of keys without values. A window is in the mask already. Raises ValueError for what is none of these.
    """
    if _called is not None:
        _called()
    strange = [name for name, given in others.items() if given is not None and name not in _WITHOUT_MEANING]
    if strange or dropout or is_causal is False or not getattr(module, "is_causal", True):
        what = strange[0] if strange else "dropout" if dropout else "attention that is not causal"
        raise ValueError(f"{type(module).__name__}: its attention takes {what}, which is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    axis: SequenceAxis | None = getattr(module, AXIS, None)
    if axis is None:
        return _attention(query, key, value, attention_mask, scale, softcap, s_aux), None
    rows, _, tokens, _ = query.shape

    def kernel(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _attention(q, k, v, attention_mask, scale, softcap, sinks[0] if sinks else None)

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    source = rank_order(rows, tokens, axis, query.device)
    return attend_to_all(q, k, v, source, axis, kernel, *([] if s_aux is None else [s_aux])), None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scale: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """`attend` over the keys it is given."""
    if softcap is None and s_aux is None:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2).contiguous()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is None:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if s_aux is not None:
        weights = weights[..., :-1]
    return (weights @ value).transpose(1, 2).contiguous()
