"""The decoder: blocks of attention and a gated MLP, or experts, whole or the part of it that a pipeline stage holds.

As a family it is Llama, Mistral, Qwen2, Qwen3, SmolLM3, Granite, OLMo 2, Phi-3 and Gemma 3, and with experts Qwen3-MoE,
Mixtral, OLMoE and DeepSeek-V3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.models import hugging_face_config as theirs
from stoker.models import hugging_face_experts as experts
from stoker.models import hugging_face_fused as fused
from stoker.models.attention import (
    Attention,
    AttentionContext,
    AttentionMask,
    Mask,
    attention_context,
    cached_mask,
    query_channels,
    value_channels,
)
from stoker.models.cache import Cache, LayerCache
from stoker.models.embedding import Embedding
from stoker.models.experts import SparseMlp
from stoker.models.family import Exported, Family, renamed
from stoker.models.feed_forward import Mlp, is_sparse
from stoker.models.flops import flops_per_token
from stoker.models.hugging_face import changed_config_json, config_json, reference_name, tensor_name
from stoker.models.hugging_face_families import family_of, is_fused
from stoker.models.hugging_face_weights import HEAD, StoredTensor, has_own_head, open_weights
from stoker.models.latent_attention import LatentAttention
from stoker.models.loss import Head
from stoker.models.norm import norm_of
from stoker.models.upcycling import without_experts
from stoker.models.window_refusals import REFUSALS
from stoker.parallel.experts import Experts
from stoker.parallel.experts.balance import count_routed
from stoker.parallel.model import Constant, Normal, Part


def _feed_forward(block: nn.Module, config: ModelConfig, number: int) -> Mlp | SparseMlp:
    """That of `block`, the layer of this `number`."""
    if not is_sparse(config, number):
        return Mlp(config.hidden_size, config.intermediate_size, config.hidden_act)
    sparse = SparseMlp(config)
    count_routed(block, sparse)
    return sparse


def _attention(config: ModelConfig, number: int) -> Attention | LatentAttention:
    return Attention(config, number) if config.kv_lora_rank is None else LatentAttention(config)


def _fed(mlp: Mlp | SparseMlp, x: Tensor, context: AttentionContext) -> Tensor:
    return mlp(x, context.rows, context.seq_len) if isinstance(mlp, SparseMlp) else mlp(x)


class Block(nn.Module):
    """A layer with norms of what attention and MLP take."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.attention_norm = norm_of(config)
        self.attention = _attention(config, number)
        self.mlp_norm = norm_of(config)
        self.mlp = _feed_forward(self, config, number)
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        x = torch.add(x, self.attention(self.attention_norm(x), context, cache), alpha=self.multiplier)
        return torch.add(x, _fed(self.mlp, self.mlp_norm(x), context), alpha=self.multiplier)


class PostNormBlock(nn.Module):
    """A layer with norms of what attention and MLP give."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.attention = _attention(config, number)
        self.attention_post_norm = norm_of(config)
        self.mlp = _feed_forward(self, config, number)
        self.mlp_post_norm = norm_of(config)
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        x = torch.add(x, self.attention_post_norm(self.attention(x, context, cache)), alpha=self.multiplier)
        return torch.add(x, self.mlp_post_norm(_fed(self.mlp, x, context)), alpha=self.multiplier)


class SandwichBlock(nn.Module):
    """A layer with norms of what attention and MLP take, and of what they give."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.attention_norm = norm_of(config)
        self.attention = _attention(config, number)
        self.attention_post_norm = norm_of(config)
        self.mlp_pre_norm = norm_of(config)
        self.mlp = _feed_forward(self, config, number)
        self.mlp_post_norm = norm_of(config)
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        attended = self.attention(self.attention_norm(x), context, cache)
        x = torch.add(x, self.attention_post_norm(attended), alpha=self.multiplier)
        given = _fed(self.mlp, self.mlp_pre_norm(x), context)
        return torch.add(x, self.mlp_post_norm(given), alpha=self.multiplier)


_INTO_STREAM = ("attention.o.weight", "mlp.down.weight", "shared.down.weight", "experts.down_proj")
_BLOCKS: dict[str, type[Block | PostNormBlock | SandwichBlock]] = {
    "before": Block,
    "after": PostNormBlock,
    "both": SandwichBlock,
}


class Decoder(nn.Module):
    """A `stoker.parallel.model.ParallelizableModel`. Tied, it holds one matrix under the name `embedding.weight`."""

    def __init__(self, config: ModelConfig, part: Part) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.config, self.part = config, part
        if part.embedding or (part.head and config.tie_word_embeddings):
            self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.mask = AttentionMask(max(query_channels(config), value_channels(config)))
        block = _BLOCKS[config.norm_placement]
        blocks = {str(number): block(config, number) for number in part.layers}
        self.windows = {number: made.attention.window for number, made in blocks.items()}
        self.layers = nn.ModuleDict(blocks)
        if part.head:
            tied = config.tie_word_embeddings
            weight = self.embedding.weight if tied else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
            self.norm = norm_of(config)
            scaling = config.logits_scaling
            rule = None if scaling == 1 else lambda logits: logits / scaling
            self.head = Head(weight, config.loss_chunk, rule=rule)

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """See `ParallelizableModel`. The part with the head returns fp32 logits `[tokens, vocab]` without labels."""
        if self.part.embedding:
            x = self._embedded(x)
        contexts = self._contexts(positions, functools.partial(self.mask, positions, documents, x.dtype))
        for number, block in self.layers.items():
            x = block(x, contexts[self.windows[number]])
        return self.head(self.norm(x), labels) if self.part.head else x

    def next_logits(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits of the token after `tokens`, int64 `[rows, new]`, which follow those in `cache`: fp32 `[rows, vocab]`.

        The whole model only. Adds the tokens to the cache.
        """
        rows, new = tokens.shape
        total = cache.length + new
        x = self._embedded(tokens)
        positions = torch.arange(cache.length, total, device=x.device).expand(rows, new)
        contexts = self._contexts(positions, functools.partial(cached_mask, new, total, x.dtype, x.device))
        for number, block in self.layers.items():
            x = block(x, contexts[self.windows[number]], cache.layers[number])
        cache.length = total
        return self.head(self.norm(x.view(rows, new, -1)[:, -1]))

    def _contexts(
        self, positions: Tensor, mask: Callable[[int | None], Mask | None]
    ) -> dict[int | None, AttentionContext]:
        """By the window of a layer, which `mask` makes a mask of."""
        windows = dict.fromkeys(self.windows.values())
        return {window: attention_context(self.config, positions, mask(window), window) for window in windows}

    def _embedded(self, tokens: Tensor) -> Tensor:
        x, multiplier = self.embedding(tokens), self.config.embedding_multiplier
        return x if multiplier == 1 else x * multiplier

    def blocks(self) -> dict[str, nn.Module]:
        return dict(self.layers.items())

    def initial(self, name: str) -> Normal | Constant:
        """Normal; smaller for projections into the residual stream, by the number of layers (GPT-2, section 2.3)."""
        if name.endswith("norm.weight"):
            return Constant(0.0 if self.config.zero_centered_norm else 1.0)
        if name.endswith(".bias"):
            return Constant(0.0)
        if name.endswith(_INTO_STREAM):
            return Normal(self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers))
        return Normal(self.config.initializer_range)

    def rebuild_buffers(self) -> None:
        """Those of experts count from zero; and `to_empty` unties what is tied."""
        for module in self.modules():
            if isinstance(module, SparseMlp):
                module.reset()
        if self.part.head and self.config.tie_word_embeddings:
            self.head.weight = self.embedding.weight


class DecoderFamily(Family):
    """The shape is in ModelConfig itself. `vocab_size` must be set where a model is built."""

    refusals = REFUSALS
    is_transformers = True

    def __call__(self, config: ModelConfig, part: Part) -> nn.Module:
        return Decoder(config, part)

    def layer_cost(self, config: ModelConfig, block: nn.Module) -> float:
        """Parameters of experts count by the share of the tokens that an expert gets."""
        share = config.num_experts_per_tok / max(1, config.num_experts)
        experts = {id(p) for module in block.modules() if isinstance(module, Experts) for p in module.parameters()}
        return float(sum(p.numel() * (share if id(p) in experts else 1.0) for p in block.parameters()))

    def flops_per_token(self, config: ModelConfig, seq_len: int, parameters: int) -> int:
        return flops_per_token(config, seq_len, parameters)

    def context(self, config: ModelConfig, seq_len: int) -> int:
        """Those it was trained at, or those that scaling extends to."""
        rope = config.rope_parameters
        if rope.factor is None or rope.original_max_position_embeddings is None:
            return seq_len
        return max(seq_len, round(rope.original_max_position_embeddings * rope.factor))

    def shape(self, folder: Path, seq_len: int) -> dict[str, Any]:
        found = theirs.shape_of(theirs.parse(folder), seq_len)
        with open_weights(folder) as tensors:
            if found["tie_word_embeddings"] and has_own_head(tensors):
                theirs.warn_untied(folder, HEAD)
                found["tie_word_embeddings"] = False
        return found

    def without_experts(self, config: ModelConfig) -> ModelConfig | None:
        return without_experts(config)

    def stored(self, config: ModelConfig, found: Mapping[str, StoredTensor], names: Iterable[str]) -> Mapping[str, Any]:
        ours = {tensor_name(name): name for name in names}
        # A head beside a tied embedding is a copy of the embedding, or one tensor too many.
        repeated = config.tie_word_embeddings and not has_own_head(found)
        stacks = {name: config.num_experts for name in ours if name.endswith((experts.GATE_UP, experts.DOWN))}
        tensors = experts.stacked(found, stacks) if stacks else found
        tensors = fused.split(tensors, config)
        return {ours.get(name, name): part for name, part in tensors.items() if not (repeated and name == HEAD)}

    def exported(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Exported]:
        if is_fused(config):
            named = {name: (tensor_name(name), shape) for name, shape in shapes.items()}
            for group in fused.put_together(named):
                yield renamed(group, *named[group]) if isinstance(group, str) else group
            return
        family = family_of(config) if config.num_experts else ""
        for name, shape in shapes.items():
            theirs = tensor_name(name)
            if theirs.endswith((experts.GATE_UP, experts.DOWN)):
                yield experts.apart(name, theirs, shape, family)
            else:
                yield renamed(name, experts.file_name(theirs, family), shape)

    def config_json(self, config: ModelConfig, dtype: str, context: int, end: int | None) -> dict[str, Any]:
        return config_json(config, dtype, context, end)

    def changed_config_json(
        self, folder: Path, config: ModelConfig, dtype: str, same_dtype: bool, seq_len: int
    ) -> dict[str, Any]:
        parsed = theirs.parse(folder)
        before = theirs.read_json(folder / theirs.CONFIG)
        values = changed_config_json(before, theirs.shape_of(parsed, 0), config, dtype, same_dtype)
        rope_changed = theirs.rope_of(parsed) != config.rope_parameters
        positions = self.context(config, seq_len) if rope_changed else seq_len
        if positions > parsed.max_position_embeddings:
            values["max_position_embeddings"] = positions
        return values

    def reference_name(self, name: str) -> str:
        return reference_name(name)


build = DecoderFamily()
