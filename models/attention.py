"""Attention: the projections, the attention function, and its inputs for a micro-batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stoker.conf.schema import ModelConfig, RopeParameters
from stoker.models.cache import LayerCache
from stoker.models.cpu_attention import attend_in_blocks
from stoker.models.document_attention import DTYPES, PackedMask, attend_packed, packed_kernel, packed_mask
from stoker.models.gathered_attention import KeySpans, attend_gathered, key_spans
from stoker.models.norm import head_norm_of
from stoker.models.rope import frequencies, latent_scale, rotary_tables, rotate, table_scale
from stoker.parallel.apart import apart
from stoker.parallel.documents import DocumentLayer
from stoker.parallel.sequence import SequenceAxis, SequenceLayer
from stoker.parallel.sequence.axis import ULYSSES
from stoker.parallel.sequence.regions import gathered, heads_to_tokens, tokens_to_heads
from stoker.parallel.tensor.layers import ColumnLinear, CopyToTensorParallel, ProjectionNorm, RowLinear

SMALLEST_HEAD = 16  # channels that a product of tensor cores takes

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class AttentionContext:
    """The inputs of attention for a micro-batch, computed once for all blocks with the same window.

    `cos` and `signed_sin` are the tables of `stoker.models.rope`. `mask` is None for causal attention within a row,
    else what `AttentionMask` made, or a tensor that is added to the scores, `[rows or 1, 1, queries, keys]`.
    """

    rows: int
    seq_len: int
    cos: Tensor
    signed_sin: Tensor
    mask: Mask | None


def attention_context(
    config: ModelConfig, positions: Tensor, mask: Mask | None, window: int | None = None
) -> AttentionContext:
    """The context of tokens at `positions` `[rows, seq_len]` in layers with this `window`."""
    rope = config.rope_parameters
    if window is not None and config.sliding_rope_theta is not None:
        rope = RopeParameters(rope_theta=config.sliding_rope_theta)
    rows, seq_len = positions.shape
    tables = rotary_tables(positions, frequencies(rotary_channels(config), rope, positions.device), table_scale(rope))
    return AttentionContext(rows, seq_len, *tables, mask)


def window_of(config: ModelConfig, layer: int) -> int | None:
    """How many keys a token sees in the layer of this number, its own among them; None: all of its document."""
    return None if layer in config.full_attention_layers else config.sliding_window


def head_dim_of(config: ModelConfig) -> int:
    """Channels of a head; with latent attention those that rotary embedding turns."""
    if config.kv_lora_rank is not None:
        return config.qk_rope_head_dim
    return config.head_dim or config.hidden_size // config.num_attention_heads


def rotary_channels(config: ModelConfig) -> int:
    """Channels of a head that rotary embedding turns."""
    return int(head_dim_of(config) * config.partial_rotary_factor)


def query_channels(config: ModelConfig) -> int:
    """Channels of a head of queries and of keys."""
    return head_dim_of(config) + (0 if config.kv_lora_rank is None else config.qk_nope_head_dim)


def value_channels(config: ModelConfig) -> int:
    """Channels of a head of values."""
    return head_dim_of(config) if config.kv_lora_rank is None else config.v_head_dim


def scale_of(config: ModelConfig) -> float:
    """The factor of the scores of attention."""
    if config.attention_multiplier is not None:
        return config.attention_multiplier
    of_rope = 1.0 if config.kv_lora_rank is None else latent_scale(config.rope_parameters)
    return query_channels(config) ** -0.5 * of_rope


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023). The number of heads follows from the weights' shapes."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.rotary = layer not in config.nope_layers
        self.window = window_of(config, layer)
        self.scale = scale_of(config)
        head_dim = self.head_dim = head_dim_of(config)
        queries, keys = (
            config.num_attention_heads * head_dim,
            (config.num_key_value_heads or config.num_attention_heads) * head_dim,
        )
        self.enter = CopyToTensorParallel()
        self.q = ColumnLinear(config.hidden_size, queries, bias=config.qkv_bias, unit=head_dim)
        self.k = ColumnLinear(config.hidden_size, keys, bias=config.qkv_bias, unit=head_dim)
        self.v = ColumnLinear(config.hidden_size, keys, bias=config.qkv_bias, unit=head_dim)
        self.o = RowLinear(queries, config.hidden_size, bias=False, unit=head_dim)
        self.q_norm, self.k_norm = _norm(config, queries), _norm(config, keys)
        self.core = CoreAttention(self.scale)

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        """Activations `[tokens, width]` to the same. With a cache, queries also attend to earlier tokens."""
        x = self.enter(x)
        by_head = (context.rows, context.seq_len, -1, self.head_dim)
        if isinstance(self.q_norm, ProjectionNorm):
            q, k = self.q_norm(self.q(x)).view(by_head), self.k_norm(self.k(x)).view(by_head)
        else:
            q, k = self.q_norm(self.q(x).view(by_head)), self.k_norm(self.k(x).view(by_head))
        if self.rotary:
            q, k = (rotate(heads, context.cos, context.signed_sin) for heads in (q, k))
        v = self.v(x).view(by_head)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.o(self.core(q, k, v, context.mask).flatten(2).flatten(0, 1))


class AttentionMask(SequenceLayer, DocumentLayer):
    """What a micro-batch's tokens may attend to, for `CoreAttention`: made once and used by every layer.

    `channels` of a head, the most of queries, keys and values, are what kernels for documents are chosen by.
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.channels = channels

    def forward(
        self, positions: Tensor, documents: Tensor | None, dtype: torch.dtype, window: int | None = None
    ) -> Mask | None:
        """Causal attention, inside `documents` (int32) if there are any, for tokens at `positions`.

        Both are `[rows, tokens]`, of this rank's share of each sequence where ranks share them. `dtype` is that of the
        scores. Of its document a token sees the last `window` keys up to its own.
        """
        axis = self.sequence
        if window is not None and window >= positions.shape[1] * (1 if axis is None else axis.size):
            window = None
        if axis is None or axis.exchange == ULYSSES:
            if documents is None and window is None:
                return None
            documents = torch.zeros_like(positions, dtype=torch.int32) if documents is None else documents
            if axis is not None:
                documents = gathered(documents, axis).transpose(0, 1).flatten(1)
            elif window is None:
                return self._inside(documents, dtype)
            return document_mask(documents, dtype, window)
        spans = key_spans(positions, documents, axis, window)
        if not positions.is_cuda:
            return SharedMask(spans, None)
        rows, tokens = positions.shape
        sizes = (rows, None, tokens, spans.source.shape[1])
        return SharedMask(spans, _create_block_mask()(spans.allowed(), *sizes, device=positions.device))

    def _inside(self, documents: Tensor, dtype: torch.dtype) -> Mask:
        """Of whole rows: by a kernel for documents where there is one and the host knows how many there are."""
        if self.bounds is not None and self.channels is not None:
            kernel = packed_kernel(self.channels, dtype, documents.device)
            if kernel is not None:
                return packed_mask(documents, self.bounds, kernel)
        return document_mask(documents, dtype)


class CoreAttention(SequenceLayer):
    """Softmax attention, without projections: the layer in which tokens meet."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        """`attention` with what `AttentionMask` made, or a tensor as in `AttentionContext`.

        Of this rank's tokens where ranks share sequences.
        """
        axis = self.sequence
        if axis is None:
            assert not isinstance(mask, SharedMask)
            return attention(q, k, v, mask, self.scale)
        if isinstance(mask, SharedMask):
            scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
            blocks = mask.blocks

            def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return attention(q, k, v, blocks, scale)

            return attend_gathered(q, k, v, mask.spans, scale, axis, kernel)
        assert axis.exchange == ULYSSES
        k, v = (_for_each(x, axis) for x in (k, v))
        q, k, v = (tokens_to_heads(x, axis) for x in (q, k, v))
        return heads_to_tokens(attention(q, k, v, mask, self.scale), axis)


@dataclass(frozen=True)
class SharedMask:
    """Which of all ranks' keys this rank's queries see; `blocks` for FlexAttention on CUDA."""

    spans: KeySpans
    blocks: BlockMask | None


Mask: TypeAlias = "Tensor | BlockMask | PackedMask | SharedMask"


def _for_each(x: Tensor, axis: SequenceAxis) -> Tensor:
    """Kv heads, one at least for each rank: with fewer than ranks, neighbours get the same one."""
    heads = x.shape[2]
    return x if heads % axis.size == 0 else x.repeat_interleave(axis.size // heads, 2)


def _norm(config: ModelConfig, channels: int) -> nn.Module:
    """That of queries or keys with so many `channels` in all heads."""
    if not config.qk_norm:
        return nn.Identity()
    head_dim = head_dim_of(config)
    if config.qk_norm_over == "projection":
        return ProjectionNorm(channels, config.rms_norm_eps, unit=head_dim)
    return head_norm_of(config, head_dim)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | PackedMask | None, scale: float | None = None
) -> Tensor:
    """Softmax attention of queries `[rows, queries, heads, head_dim]`, in the same shape.

    `k` and `v` are `[rows, keys, kv_heads, head_dim]`; kv_heads divides heads; consecutive query heads share one.
    `mask` as in `AttentionContext`; None means causal attention, where there are as many keys as queries. Scores are
    multiplied by `scale`, by default 1 / sqrt(head_dim).
    """
    if isinstance(mask, PackedMask):
        if q.dtype in DTYPES:
            return attend_packed(q, k, v, mask, scale)
        make: Any = document_mask
        mask = apart(make)(mask.documents, q.dtype)  # a layer that computes in fp32, unlike the others
    if mask is not None and not isinstance(mask, Tensor):
        return _by_blocks(_flex_attention(), q, k, v, mask, scale)
    mask = None if mask is None else mask.to(q.dtype)  # a layer may compute in another dtype than the others
    in_blocks = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[1] == k.shape[1]
    if in_blocks and not torch.compiler.is_compiling():
        return attend_in_blocks(q, k, v, mask, scale)
    if q.dtype == torch.float32 and q.device.type == "cuda":
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))  # no fused kernel has groups in fp32
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)


def _by_blocks(
    flex_attention: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float | None = None,
) -> Tensor:
    """FlexAttention. Its kernels take heads of SMALLEST_HEAD channels at least: smaller ones are filled with zeros."""
    head_dim = q.shape[-1]
    missing = max(0, SMALLEST_HEAD - head_dim)
    by_head = (F.pad(x, (0, missing)).transpose(1, 2) if missing else x.transpose(1, 2) for x in (q, k, v))
    scale = head_dim**-0.5 if scale is None else scale
    return flex_attention(*by_head, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)[..., :head_dim]


def document_mask(documents: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor | BlockMask:
    """Causal attention that stays inside documents, for int32 document numbers `[rows, seq_len]`, and in a `window`.

    On CUDA a block mask for FlexAttention, which skips the blocks that are masked whole; elsewhere a tensor in
    `dtype` that is added to the scores, `[rows, 1, seq_len, seq_len]`.
    """
    rows, seq_len = documents.shape
    if documents.is_cuda:
        allowed = same_document(documents, window)
        return _create_block_mask()(allowed, rows, None, seq_len, seq_len, device=documents.device)
    mask = torch.full((rows, 1, seq_len, seq_len), float("-inf"), dtype=dtype, device=documents.device)
    mask.masked_fill_((documents[:, :, None] == documents[:, None, :])[:, None], 0.0)
    return mask.masked_fill_(_unseen(seq_len, seq_len, window, documents.device), float("-inf"))


def same_document(documents: Tensor, window: int | None = None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's mask function: (row, head, query, key) -> whether the query may attend to the key."""

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (documents[row, query] == documents[row, key])
        return seen if window is None else seen & (query - key < window)

    return allowed


def cached_mask(queries: int, keys: int, dtype: torch.dtype, device: torch.device, window: int | None = None) -> Tensor:
    """Causal attention of the last `queries` of `keys` tokens in a `window`: what is added to the scores."""
    zeros = torch.zeros(1, 1, queries, keys, dtype=dtype, device=device)
    return zeros.masked_fill_(_unseen(queries, keys, window, device), float("-inf"))


def _unseen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys lie after each of the last `queries` tokens, or before its window: bool `[queries, keys]`."""
    every = torch.ones(queries, keys, dtype=torch.bool, device=device)
    unseen = every.triu(keys - queries + 1)
    return unseen if window is None else unseen.logical_or_(every.tril_(keys - queries - window))


@functools.cache
def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)  # uncompiled it holds all scores


@functools.cache
def _create_block_mask() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)  # uncompiled it holds the mask of every pair of tokens
