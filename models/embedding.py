"""Tokens to activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """`weight` is `[vocab, width]`. Int64 tokens of any shape give flat activations `[tokens, width]`."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return _Lookup.apply(tokens.flatten(), self.weight)


class _Lookup(torch.autograd.Function):
    """A lookup whose gradient is summed in fp32.

    The stock gradient on CPUs is summed in the weight's dtype: in bf16 a token that occurs a few hundred times in a
    micro-batch then loses most of its gradient's digits.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.vocab_size, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        summed = torch.ops.aten.embedding_dense_backward(gradient.float(), tokens, ctx.vocab_size, -1, False)
        return None, summed.to(ctx.dtype)
