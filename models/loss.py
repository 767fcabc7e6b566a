"""Activations to the loss, without the logits of more than one chunk of tokens at a time.

For a vocabulary of 128k the fp32 logits of 8192 tokens are 4 GB, several times over in backward. The gradient of a
cross entropy needs only its logits, so it is computed in the forward pass, chunk by chunk, and backward only
scales it (the fused linear cross entropy of Liger Kernel, Hsu et al. 2024, section 3.2).

Where tensor-parallel ranks share the vocabulary no logit leaves its rank. Two numbers per token do: the logarithm of
the rank's sum of exponentials, and the logit of the label if it is among the rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stoker.parallel.batch import IGNORE_INDEX
from stoker.parallel.model import Role
from stoker.parallel.objective import Targets
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
    takes_targets = True

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

    def forward(self, x: Tensor, labels: Tensor | Targets | None = None) -> Tensor:
        """The summed loss (fp32 scalar) of activations `[tokens, width]`, or what `Targets` in the place of labels ask
        for; without labels the fp32 logits.

        A sharded head has no logits.
        """
        if self.vocabulary is not None:
            assert labels is not None, "tensor-parallel ranks hold no token's logits whole"
            x = enter(x, self.vocabulary.axis)
        if labels is None:
            return self.logits(x)
        targets = labels if isinstance(labels, Targets) else Targets(labels)
        wanted, weights = targets.labels.flatten(), targets.weights
        if targets.per_token:
            return log_probabilities(x, self.weight, wanted, self.chunk, self.vocabulary, self.bias, self.rule)
        weights = None if weights is None else weights.flatten()
        z_loss = targets.z_loss if self.training else 0.0
        return summed_loss(x, self.weight, wanted, self.chunk, self.vocabulary, self.bias, self.rule, weights, z_loss)

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
    weights: Tensor | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """The sum over tokens of the cross entropy of `rule(hidden @ weight.T + bias)`: fp32 scalar.

    Each token's has `z_loss` times the squared logarithm of the softmax's normaliser added (Chowdhery et al. 2022,
    section 5), and is multiplied by its number in `weights` (fp32 `[tokens]`).

    `hidden` is `[tokens, width]`, `weight` `[vocab, width]`, `labels` int64 `[tokens]`, those that are IGNORE_INDEX
    left out. Softmax and sums are fp32 for every dtype; `chunk` tokens have logits at one time. Between forward and
    backward it holds the gradients: one of the size of `hidden`, and one of `weight` in fp32.

    With a `vocabulary` `weight` and `bias` are this rank's share of it. All its ranks call with the same hidden and
    labels, and get the same loss; the gradient of `hidden` is this rank's part of a sum over them.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _SummedLoss.apply(hidden, weight, bias, labels, chunk, vocabulary, rule, weights, z_loss)
    total = torch.zeros((), device=hidden.device)
    for start in range(0, len(hidden), chunk):
        span = slice(start, start + chunk)
        logits = _logits(hidden[span], weight, bias, rule)
        softmax = _Softmax.of(logits, labels[span], vocabulary)
        losses, log_sum = _losses(softmax, logits, vocabulary)
        if z_loss:
            losses = losses + softmax.z_loss(log_sum, z_loss)
        total += (losses if weights is None else losses * weights[span, None]).sum()
    return total


def log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    vocabulary: Vocabulary | None = None,
    bias: Tensor | None = None,
    rule: Rule | None = None,
) -> Tensor:
    """The log-probability of each label under `rule(hidden @ weight.T + bias)`: fp32 `[tokens]`, 0 where it is ignored.

    Arguments as those of `summed_loss`. Which gradient each token has is known only in backward, so that the logits of
    each chunk are computed once more there; nothing of the size of a chunk's logits is held in between.
    """
    return _LogProbabilities.apply(hidden, weight, bias, labels, chunk, vocabulary, rule)


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
        weights: Tensor | None,
        z_loss: float,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        for start in range(0, len(hidden), chunk):
            span = slice(start, start + chunk)
            raw, logits = _ruled(rule, _logits(hidden[span], weight, bias, None))
            softmax = _Softmax.of(logits.detach(), labels[span], vocabulary)
            losses, log_sum = _losses(softmax, logits.detach(), vocabulary)
            if z_loss:
                losses = losses + softmax.z_loss(log_sum, z_loss)
            grad_logits = softmax.gradient(log_sum, z_loss)
            if weights is not None:
                factors = weights[span, None]
                losses, grad_logits = losses * factors, grad_logits.mul_(factors)
            total += losses.sum()
            gradients.add(span, _by_raw(rule, raw, logits, grad_logits))
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
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
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


class _LogProbabilities(torch.autograd.Function):
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
        found = torch.empty(len(hidden), device=hidden.device)
        log_sums = torch.empty(len(hidden), 1, dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            span = slice(start, start + chunk)
            logits = _logits(hidden[span], weight, bias, rule)
            losses, log_sums[span] = _losses(_Softmax.of(logits, labels[span], vocabulary), logits, vocabulary)
            found[span] = -losses[:, 0]
        ctx.save_for_backward(hidden, weight, bias, labels, log_sums)
        ctx.chunk, ctx.vocabulary, ctx.rule = chunk, vocabulary, rule
        ctx.border = None if vocabulary is None else LEAVES
        return found

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, log_sums = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        for start in range(0, len(hidden), ctx.chunk):
            span = slice(start, start + ctx.chunk)
            raw, logits = _ruled(ctx.rule, _logits(hidden[span], weight, bias, None))
            softmax = _Softmax.of(logits.detach(), labels[span], ctx.vocabulary)
            grad_logits = softmax.gradient(log_sums[span]).mul_(-grad_output[span, None])
            gradients.add(span, _by_raw(ctx.rule, raw, logits, grad_logits))
        grad_weight, grad_bias = (
            None if gradient is None else gradient.to(weight.dtype) for gradient in (gradients.weight, gradients.bias)
        )
        return gradients.hidden, grad_weight, grad_bias, None, None, None, None


class _Gradients:
    """Of the inputs of a head, collected over chunks of tokens; None where there is none."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> None:
        self._rows, self._matrix = hidden, weight
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None

    def add(self, span: slice, grad_logits: Tensor) -> None:
        """`grad_logits`: fp32 `[chunk, vocab]`, of the tokens in `span`."""
        if self.bias is not None:
            self.bias += grad_logits.sum(0)
        grad_logits = grad_logits.to(self._rows.dtype)
        if self.hidden is not None:
            torch.mm(grad_logits, self._matrix, out=self.hidden[span])
        if self.weight is not None:
            self.weight += grad_logits.T @ self._rows[span]


def _ruled(rule: Rule | None, raw: Tensor) -> tuple[Tensor, Tensor]:
    """`raw` and `rule(raw)`, from which `_by_raw` finds the way back."""
    if rule is None:
        return raw, raw
    with torch.enable_grad():
        raw = raw.detach().requires_grad_()
        return raw, rule(raw)


def _by_raw(rule: Rule | None, raw: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
    """The gradient by `raw`, fp32, of what has this `gradient` by the `logits`."""
    return gradient if rule is None else torch.autograd.grad(logits, raw, gradient.to(logits.dtype))[0].float()


@dataclass(frozen=True)
class _Softmax:
    """Of a chunk of tokens, over this rank's share of the vocabulary."""

    values: Tensor  # fp32 [chunk, vocab]
    log_sum: Tensor  # fp64 [chunk, 1], of the exponentials
    wanted: Tensor  # int64 [chunk, 1], the labels by their places in the share
    mine: Tensor  # bool [chunk, 1], whether the label is in it
    valid: Tensor  # bool [chunk, 1], whether there is a label: not IGNORE_INDEX

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, vocabulary: Vocabulary | None) -> _Softmax:
        valid = (labels != IGNORE_INDEX)[:, None]
        wanted = labels[:, None].masked_fill(~valid, 0)
        wanted, mine = (wanted, valid) if vocabulary is None else vocabulary.own(wanted)
        softmax = logits.softmax(-1, dtype=torch.float32)
        largest, at = logits.max(-1, keepdim=True)
        # fp64: a loss is the small difference of large logits
        log_sum = largest.double() - softmax.gather(-1, at).double().log()
        return cls(softmax, log_sum, wanted, mine, valid)

    def z_loss(self, log_sum: Tensor, factor: float) -> Tensor:
        """`factor` x the square of `log_sum`, that of the whole vocabulary: fp64 `[chunk, 1]`, zero without a label."""
        return factor * log_sum.square().where(self.valid, 0.0)

    def gradient(self, log_sum: Tensor, z_loss: float = 0.0) -> Tensor:
        """Of the loss by the logits: softmax - onehot(labels), zero without a label. It takes the place of `values`.

        `log_sum` is that of the whole vocabulary; `z_loss` the factor of its square in the loss.
        """
        share = (self.log_sum - log_sum).exp().where(self.valid, 0.0).float()  # of all probability; 1 for a whole one
        if z_loss:
            share = share * (1.0 + 2.0 * z_loss * log_sum).float()
        return self.values.mul_(share).scatter_add_(-1, self.wanted, -(self.mine & self.valid).float())


def _losses(softmax: _Softmax, logits: Tensor, vocabulary: Vocabulary | None) -> tuple[Tensor, Tensor]:
    """The loss of each label, and the `log_sum` of the whole vocabulary: fp64 `[chunk, 1]` each."""
    log_sum, target = softmax.log_sum, logits.gather(-1, softmax.wanted).double()
    if vocabulary is not None:
        message = torch.cat([log_sum, target.where(softmax.mine, 0.0)], -1)
        axis = vocabulary.axis
        of_ranks = all_gather(message, axis.group_name, axis.size).view(axis.size, *message.shape)
        log_sum = of_ranks[:, :, :1].logsumexp(0)
        target = of_ranks[:, :, 1:].sum(0)
    return (log_sum - target).where(softmax.valid, 0.0), log_sum
