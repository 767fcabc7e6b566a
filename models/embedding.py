"""Tokens to activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stoker.parallel.model import Role
from stoker.parallel.tensor.layers import Vocabulary, VocabularyLayer
from stoker.parallel.tensor.regions import leave


class Embedding(VocabularyLayer):
    """`weight` is `[vocab, width]`. Int64 tokens of any shape give flat activations `[tokens, width]`."""

    role = Role.EMBEDDING

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return lookup(tokens.flatten(), self.weight, self.vocabulary)


def lookup(tokens: Tensor, weight: Tensor, vocabulary: Vocabulary | None) -> Tensor:
    """The rows of `weight` at int64 `tokens` `[tokens]`; with a `vocabulary` `weight` is this rank's share of it."""
    if vocabulary is None:
        return _Lookup.apply(tokens, None, weight)
    rows, mine = vocabulary.own(tokens)
    return leave(_Lookup.apply(rows, ~mine, weight), vocabulary.axis)


class _Lookup(torch.autograd.Function):
    """A lookup, zero for `foreign` tokens, whose gradient is summed in fp32.

    The stock gradient on CPUs is summed in the weight's dtype: in bf16 a token that occurs a few hundred times in a
    micro-batch then loses most of its gradient's digits.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, foreign: Tensor | None, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, foreign)
        ctx.vocab_size, ctx.dtype = weight.shape[0], weight.dtype
        found = F.embedding(tokens, weight)
        return found if foreign is None else found.masked_fill_(foreign[:, None], 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        tokens, foreign = ctx.saved_tensors
        gradient, own = gradient.float(), ctx.vocab_size
        backward = torch.ops.aten.embedding_dense_backward
        if foreign is None:
            summed = backward(gradient, tokens, own, -1, False)
        else:  # into an additional row, which is dropped
            summed = backward(gradient, tokens.masked_fill(foreign, own), own + 1, own, False)[:own]
        return None, None, summed.to(ctx.dtype)
