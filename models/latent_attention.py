"""Multi-head latent attention (DeepSeek-V2, section 2.1): all heads' keys and values are made of one narrow vector.

    x ── q_a, norm ──► latent of queries ── q_b ──► queries
      └─ kv_a ──┬ norm ──► latent of keys and values ── kv_b ──► keys, values
                └────────► the channels of keys that rotary embedding turns, the same for all heads

The latents lie outside tensor-parallel regions: under sequence parallelism a rank makes those of its tokens, and they
are what is gathered. Heads are shared among ranks as in `stoker.models.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.models.attention import AttentionContext, CoreAttention, query_channels, scale_of
from stoker.models.cache import LayerCache
from stoker.models.rope import in_halves, rotate
from stoker.parallel.tensor.layers import ColumnLinear, CopyToTensorParallel, RowLinear

_EPS = 1e-6  # of the norms of latents, whatever `rms_norm_eps` is: so in DeepSeek's code and in transformers


class LatentAttention(nn.Module):
    """`model.kv_lora_rank`. Without `model.q_lora_rank` queries are made of the activations themselves."""

    window: int | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        assert rank is not None
        self.rank, self.interleaved = rank, config.rope_interleave
        self.still, self.turning, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.score = query_channels(config)
        self.enter = CopyToTensorParallel()
        if config.q_lora_rank is None:
            self.q = ColumnLinear(width, heads * self.score, bias=False, unit=self.score)
        else:
            self.q_a = nn.Linear(width, config.q_lora_rank, bias=False)
            self.q_a_norm = nn.RMSNorm(config.q_lora_rank, _EPS)
            self.q_b = ColumnLinear(config.q_lora_rank, heads * self.score, bias=False, unit=self.score)
        self.queries_of_latents = config.q_lora_rank is not None
        self.kv_a = nn.Linear(width, rank + self.turning, bias=False)
        self.kv_a_norm = nn.RMSNorm(rank, _EPS)
        both = self.still + self.value
        self.kv_b = ColumnLinear(rank, heads * both, bias=False, unit=both)
        self.o = RowLinear(heads * self.value, width, bias=False, unit=self.value)
        self.core = CoreAttention(scale_of(config))

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        """As `stoker.models.attention.Attention`."""
        by_head = (context.rows, context.seq_len, -1)
        latent, turning = self.kv_a(x).split([self.rank, self.turning], -1)
        latent = self.kv_a_norm(latent)
        if self.queries_of_latents:
            of_queries, latent, turning = self._entered(self.q_a_norm(self.q_a(x)), latent, turning)
            q = self.q_b(of_queries)
        else:
            latent, turning = self._entered(latent, turning)
            q = self.q(self.enter(x))
        q = self._turned(q.view(*by_head, self.score), context)
        still, v = self.kv_b(latent).view(*by_head, self.still + self.value).split([self.still, self.value], -1)
        turned = self._turned(turning.reshape(*by_head, self.turning), context)
        k = torch.cat([still, turned.expand(-1, -1, still.shape[2], -1)], -1)

        # Kernels take heads of one width: what is narrower is filled with zeros, which change no result.
        q, k, v = (self._filled(heads) for heads in (q, k, v))
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.o(self.core(q, k, v, context.mask)[..., : self.value].flatten(2).flatten(0, 1))

    def _entered(self, *parts: Tensor) -> Sequence[Tensor]:
        """`parts`, `[tokens, channels]` each, inside the region: one message."""
        if self.enter.axis is None:
            return parts
        return self.enter(torch.cat(parts, -1)).split([part.shape[-1] for part in parts], -1)

    def _filled(self, heads: Tensor) -> Tensor:
        missing = max(self.score, self.value) - heads.shape[-1]
        return F.pad(heads, (0, missing)) if missing else heads

    def _turned(self, heads: Tensor, context: AttentionContext) -> Tensor:
        """`heads` with rotary embedding on their last channels."""
        still, turning = heads.split([heads.shape[-1] - self.turning, self.turning], -1)
        turned = rotate(in_halves(turning) if self.interleaved else turning, context.cos, context.signed_sin)
        return torch.cat([still, turned], -1)
