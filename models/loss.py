"""Activations to the loss, without the logits of more than one chunk of tokens at a time.

For a vocabulary of 128k the fp32 logits of 8192 tokens are 4 GB, several times over in backward. The gradient of a
cross entropy needs only its logits, so it is computed in the forward pass, chunk by chunk, and backward only
scales it (the fused linear cross entropy of Liger Kernel, Hsu et al. 2024, section 3.2).

Where tensor-parallel ranks share the vocabulary no logit leaves its rank. Two numbers per token do: the logarithm of
the rank's sum of exponentials, and the logit of the label if it is among the rank's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stoker.parallel.batch import IGNORE_INDEX
from stoker.parallel.model import Role
from stoker.parallel.registry import Entry
from stoker.parallel.tensor.axis import TensorAxis, sharded_entry
from stoker.parallel.tensor.layers import Vocabulary, VocabularyLayer
from stoker.parallel.tensor.regions import LEAVES, all_gather, enter

Rule = Callable[[Tensor], Tensor]  # what a model does to logits, each by itself: a scale, a softcap


class Head(VocabularyLayer):
    """The output projection and the loss. `weight` is `[vocab, width]`; a tied model puts its embedding's there.

    `bias` is `[vocab]`. `rule` is applied to the logits, of any part of the vocabulary.
    """

    role = Role.HEAD

    def __init__(
        self, weight: nn.Parameter, chunk: int, bias: nn.Parameter | None = None, rule: Rule | None = None
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.chunk = chunk
        self.rule = rule

    def cut(self, axis: TensorAxis) -> list[Entry]:
        entries = super().cut(axis)
        assert self.vocabulary is not None
        if self.bias is not None:
            entries.append(sharded_entry("bias", tuple(self.bias.shape), 0, self.vocabulary.share))
        return entries

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The summed loss (fp32 scalar) of activations `[tokens, width]`; without labels the fp32 logits.

        A sharded head has a loss only.
        """
        if self.vocabulary is not None:
            assert labels is not None, "tensor-parallel ranks hold no token's logits whole"
            x = enter(x, self.vocabulary.axis)
        if labels is None:
            return self.logits(x)
        return summed_loss(x, self.weight, labels.flatten(), self.chunk, self.vocabulary, self.bias, self.rule)

    def logits(self, x: Tensor) -> Tensor:
        """The fp32 logits of activations `[tokens, width]`, of this rank's share of the vocabulary."""
        return _logits(x, self.weight, self.bias, self.rule).float()


def summed_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    vocabulary: Vocabulary | None = None,
    bias: Tensor | None = None,
    rule: Rule | None = None,
) -> Tensor:
    """The sum over tokens of the cross entropy of `rule(hidden @ weight.T + bias)`: fp32 scalar.

    `hidden` is `[tokens, width]`, `weight` `[vocab, width]`, `labels` int64 `[tokens]`, those that are IGNORE_INDEX
             left
    out. Softmax and sums are fp32 for every dtype; `chunk` tokens have logits at one time. Between forward and
    backward it holds the gradients: one of the size of `hidden`, and one of `weight` in fp32.

    With a `vocabulary` `weight` and `bias` are this rank's share of it. All its ranks call with the same hidden and
    labels, and get the same loss; the gradient of `hidden` is this rank's part of a sum over them.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _SummedLoss.apply(hidden, weight, bias, labels, chunk, vocabulary, rule)
    total = torch.zeros((), device=hidden.device)
    for rows, wanted in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total += _cross_entropy(_logits(rows, weight, bias, rule), wanted, vocabulary)[0]
    return total


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: Rule | None) -> Tensor:
    logits = hidden @ weight.T
    logits = logits if bias is None else logits + bias
    return logits if rule is None else rule(logits)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: int,
        vocabulary: Vocabulary | None,
        rule: Rule | None,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
        for start in range(0, len(hidden), chunk):
            rows, wanted = hidden[start : start + chunk], labels[start : start + chunk]
            raw = _logits(rows, weight, bias, None)
            loss, grad_logits = _through(rule, raw, wanted, vocabulary)
            total += loss
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + chunk])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        ctx.border = None if vocabulary is None else LEAVES  # the ranks' results are summed in here
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_output.to(grad_hidden.dtype)
        # Scaled before it is cast: a sum over many tokens need not fit into fp16.
        grad_weight, grad_bias = (
            None if gradient is None else (gradient * grad_output).to(ctx.dtype)
            for gradient in (grad_weight, grad_bias)
        )
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _through(rule: Rule | None, raw: Tensor, labels: Tensor, vocabulary: Vocabulary | None) -> tuple[Tensor, Tensor]:
    """`_cross_entropy` of `rule(raw)`, its gradient by `raw`."""
    if rule is None:
        return _cross_entropy(raw, labels, vocabulary)
    with torch.enable_grad():
        raw = raw.detach().requires_grad_()
        logits = rule(raw)
    loss, gradient = _cross_entropy(logits.detach(), labels, vocabulary)
    return loss, torch.autograd.grad(logits, raw, gradient.to(logits.dtype))[0].float()


def _cross_entropy(logits: Tensor, labels: Tensor, vocabulary: Vocabulary | None) -> tuple[Tensor, Tensor]:
    """The summed loss of `labels` `[chunk]` (fp64 scalar) and its gradient by `logits` (fp32 `[chunk, vocab]`).

    The gradient is softmax - onehot(labels), zero where the label is IGNORE_INDEX.
    """
    valid = (labels != IGNORE_INDEX)[:, None]
    wanted = labels[:, None].masked_fill(~valid, 0)
    wanted, mine = (wanted, valid) if vocabulary is None else vocabulary.own(wanted)

    softmax = logits.softmax(-1, dtype=torch.float32)
    largest, at = logits.max(-1, keepdim=True)
    # fp64: a loss is the small difference of large logits
    own_log_sum = largest.double() - softmax.gather(-1, at).double().log()
    log_sum, target = own_log_sum, logits.gather(-1, wanted).double()
    if vocabulary is not None:
        message = torch.cat([log_sum, target.where(mine, 0.0)], -1)
        axis = vocabulary.axis
        of_ranks = all_gather(message, axis.group_name, axis.size).view(axis.size, *message.shape)
        log_sum = of_ranks[:, :, :1].logsumexp(0)
        target = of_ranks[:, :, 1:].sum(0)

    loss = (log_sum - target).where(valid, 0.0).sum()
    share = (own_log_sum - log_sum).exp().where(valid, 0.0).float()  # of all probability; 1 for a whole vocabulary
    return loss, softmax.mul_(share).scatter_add_(-1, wanted, -(mine & valid).float())
