"""RMSNorm (Zhang and Sennrich 2019) of activations and of heads, with weights around one or around zero."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.parallel.tensor.layers import HeadNorm, ReplicatedInTensorParallel


class ZeroCenteredNorm(nn.RMSNorm):
    """RMSNorm whose factors are 1 + weight, in fp32: near one, bf16 has steps of 0.008 only."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps)
        return normed.to(x.dtype)


class ZeroCenteredHeadNorm(ReplicatedInTensorParallel, ZeroCenteredNorm):
    """As `stoker.parallel.tensor.layers.HeadNorm`."""


def norm_of(config: ModelConfig) -> nn.RMSNorm:
    """That of the activations, `[tokens, width]`."""
    kind = ZeroCenteredNorm if config.zero_centered_norm else nn.RMSNorm
    return kind(config.hidden_size, config.rms_norm_eps)


def head_norm_of(config: ModelConfig, channels: int) -> nn.RMSNorm:
    """That of heads, `[..., channels]`."""
    kind = ZeroCenteredHeadNorm if config.zero_centered_norm else HeadNorm
    return kind(channels, config.rms_norm_eps)
