"""Feed-forward networks: one for all tokens, or experts of which each token uses a few."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.parallel.experts import Experts
from stoker.parallel.tensor.layers import ColumnLinear, CopyToTensorParallel, RowLinear

_LEAST_SUM = 1e-20  # of the weights of a token's experts, which are divided by it


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.enter = CopyToTensorParallel()
        self.gate = ColumnLinear(width, hidden, bias=False)
        self.up = ColumnLinear(width, hidden, bias=False)
        self.down = RowLinear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Router(nn.Module):
    """Chooses the experts of each token. Its product and all that follows is in fp32, whatever the precision."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.chosen, self.kind, self.normalised = config.num_experts_per_tok, config.router, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For `x` `[tokens, width]` the experts of each token, int64 `[tokens, k]`, and their weights, fp32."""
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.softmax(-1) if self.kind == "softmax" else logits.sigmoid()
        chosen = scores.detach().topk(self.chosen, -1).indices
        weights = scores.gather(1, chosen)
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + _LEAST_SUM)
        return chosen, weights


class SparseMlp(nn.Module):
    """A mixture of experts (Shazeer et al. 2017), none of whose tokens is dropped, and experts that all tokens share.

    Outside tensor-parallel regions: every rank computes the tokens that it holds there, with whole experts. The
    shared experts are a region of their own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, expert_width(config)
        self.router = Router(config)
        self.experts = Experts(config.num_experts, width, hidden)
        shared = config.num_shared_experts
        self.shared = Mlp(width, hidden * shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` and the result are `[tokens, width]`."""
        chosen, weights = self.router(x)
        out = self.experts(x, chosen, weights)
        return out if self.shared is None else out + self.shared(x)


def expert_width(config: ModelConfig) -> int:
    """Channels inside an expert."""
    return config.moe_intermediate_size or config.intermediate_size


def is_sparse(config: ModelConfig, layer: int) -> bool:
    """Whether the layer of this number has experts."""
    return config.num_experts > 0 and layer >= config.first_dense_layers


def all_sparse(config: ModelConfig) -> bool:
    """Whether no layer has one MLP for all tokens."""
    return config.num_experts > 0 and config.first_dense_layers == 0


def feed_forward(config: ModelConfig, layer: int) -> Mlp | SparseMlp:
    """That of the layer of this number."""
    return SparseMlp(config) if is_sparse(config, layer) else Mlp(config.hidden_size, config.intermediate_size)


def idle_parameters(config: ModelConfig) -> int:
    """Numbers in the experts of the whole model that a token does not use."""
    layers = sum(is_sparse(config, layer) for layer in range(config.num_hidden_layers))
    unused = max(0, config.num_experts - config.num_experts_per_tok)
    return layers * unused * 3 * config.hidden_size * expert_width(config)
