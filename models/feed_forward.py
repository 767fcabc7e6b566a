"""The feed-forward network of all tokens, and which layers have experts in its place (`stoker.models.experts`)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.parallel.tensor.layers import ColumnLinear, CopyToTensorParallel, RowLinear


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_pytorch_tanh": _gelu_tanh}


class Mlp(nn.Module):
    """A gated MLP: SwiGLU, or with another `activation` GeGLU (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, activation: str = "silu") -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        self.enter = CopyToTensorParallel()
        self.gate = ColumnLinear(width, hidden, bias=False)
        self.up = ColumnLinear(width, hidden, bias=False)
        self.down = RowLinear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.down(self.activation(self.gate(x)) * self.up(x))


def expert_width(config: ModelConfig) -> int:
    """Channels inside an expert."""
    return config.moe_intermediate_size or config.intermediate_size


def is_sparse(config: ModelConfig, layer: int) -> bool:
    """Whether the layer of this number has experts."""
    return config.num_experts > 0 and layer >= config.first_dense_layers


def all_sparse(config: ModelConfig) -> bool:
    """Whether no layer has one MLP for all tokens."""
    return config.num_experts > 0 and config.first_dense_layers == 0


def idle_parameters(config: ModelConfig) -> int:
    """Numbers in the experts of the whole model that a token does not use."""
    layers = sum(is_sparse(config, layer) for layer in range(config.num_hidden_layers))
    unused = max(0, config.num_experts - config.num_experts_per_tok)
    return layers * unused * 3 * config.hidden_size * expert_width(config)
