"""The softmax of a chunk of tokens in two compiled passes over its logits, which exist in no other dtype than theirs.

Without compilation each operation is a pass: the softmax in fp32 is written, scaled, read again and rounded. Here the
first kernel reads the logits and leaves two numbers a token, the second reads them again and writes the gradient in
the dtype of the products that take it. What lies between, numbers of tokens, stays as in `stoker.models.softmax`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stoker.models.softmax import of_all_ranks
from stoker.parallel.batch import IGNORE_INDEX
from stoker.parallel.tensor.layers import Vocabulary


def normaliser(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of `[chunk, vocab]`, and the sum of the exponentials of what is below it: fp32 each."""
    values = logits.float()
    largest = values.amax(-1, keepdim=True)
    return largest, (values - largest).exp().sum(-1, keepdim=True)


def slopes(
    logits: Tensor, largest: Tensor, factor: Tensor, wanted: Tensor, target: Tensor, dtype: torch.dtype
) -> Tensor:
    """exp(logits - largest) x factor, less `target` in the column `wanted` of each row: `[chunk, vocab]` in `dtype`.

    The others are `[chunk, 1]`, fp32 but for `wanted`, which is int64.
    """
    found = (logits.float() - largest).exp() * factor
    columns = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(columns == wanted, found - target, found).to(dtype)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def losses_and_slopes(
    logits: Tensor,
    labels: Tensor,
    vocabulary: Vocabulary | None,
    z_loss: float,
    weights: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The loss of each token, fp64 `[chunk, 1]`, and its gradient by `logits`, in `dtype`.

    `labels` are int64 `[chunk]`, `weights` fp32 `[chunk, 1]`; `logits` are of this rank's share of the vocabulary.
    """
    valid = (labels != IGNORE_INDEX)[:, None]
    wanted = labels[:, None].masked_fill(~valid, 0)
    wanted, mine = (wanted, valid) if vocabulary is None else vocabulary.own(wanted)
    largest, exponentials = _compiled(normaliser)(logits)
    own_log_sum = largest.double() + exponentials.double().log()
    own_target = logits.gather(-1, wanted).double()
    if vocabulary is not None:
        own_target = own_target.where(mine, 0.0)
    log_sum, target = of_all_ranks(own_log_sum, own_target, vocabulary)
    losses = (log_sum - target).where(valid, 0.0)
    share = (own_log_sum - log_sum).exp().where(valid, 0.0)  # of all probability
    if z_loss:
        losses = losses + z_loss * log_sum.square().where(valid, 0.0)
        share = share * (1.0 + 2.0 * z_loss * log_sum)
    hit = (mine & valid).float()
    if weights is not None:
        losses, share, hit = losses * weights, share * weights, hit * weights
    factor = (share / exponentials).float()
    return losses, _compiled(slopes)(logits, largest, factor, wanted, hit, dtype)
