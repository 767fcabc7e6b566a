"""Activations to the loss, without the logits of more than one chunk of tokens at a time.

For a vocabulary of 128k the fp32 logits of 8192 tokens are 4 GB, several times over in backward. The gradient of a
cross entropy needs only its logits, so it is computed in the forward pass, chunk by chunk, and backward only
scales it (the fused linear cross entropy of Liger Kernel, Hsu et al. 2024, section 3.2).

Where tensor-parallel ranks share the vocabulary no logit leaves its rank. Two numbers per token do: the logarithm of
the rank's sum of exponentials, and the logit of the label if it is among the rank's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stoker.models.compiled_loss import losses_and_slopes
from stoker.models.loss_gradients import Gradients
from stoker.models.softmax import Softmax, top_log_probabilities
from stoker.parallel.model import Role
from stoker.parallel.objective import Targets, Teacher
from stoker.parallel.registry import Entry
from stoker.parallel.tensor.axis import TensorAxis, sharded_entry
from stoker.parallel.tensor.layers import Vocabulary, VocabularyLayer
from stoker.parallel.tensor.regions import LEAVES, enter

CHUNK = 1024  # tokens whose logits exist at one time, where nobody says how many
Rule = Callable[[Tensor], Tensor]  # what a model does to logits, each by itself: a scale, a softcap


class Head(VocabularyLayer):
    """The output projection and the loss. `weight` is `[vocab, width]`; a tied model puts its embedding's there.

    `bias` is `[vocab]`. `rule` is applied to the logits, of any part of the vocabulary. `chunk` tokens have logits at
    one time, by default CHUNK.
    """

    role = Role.HEAD
    takes_targets = True
    compiled = False  # in training the softmax of a chunk is computed by compiled kernels

    def __init__(
        self, weight: nn.Parameter, chunk: int | None = None, bias: nn.Parameter | None = None, rule: Rule | None = None
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.chunk = CHUNK if chunk is None else chunk
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
        if targets.top_k:
            return self._most_probable(x, wanted, targets.top_k)
        if targets.per_token:
            return log_probabilities(x, self.weight, wanted, self.chunk, self.vocabulary, self.bias, self.rule)
        aim = Aim(
            wanted,
            None if weights is None else weights.flatten(),
            targets.z_loss if self.training else 0.0,
            targets.teacher,
            self.compiled,
        )
        return summed_loss(x, self.weight, aim, self.chunk, self.vocabulary, self.bias, self.rule)

    def _most_probable(self, x: Tensor, labels: Tensor, k: int) -> Tensor:
        """See `Targets.top_k`."""
        found = torch.empty(len(x), 1 + 2 * k, dtype=torch.float64, device=x.device)
        for start in range(0, len(x), self.chunk):
            span = slice(start, start + self.chunk)
            logits = _logits(x[span], self.weight, self.bias, self.rule)
            losses, _ = Softmax.of(logits, labels[span], self.vocabulary).losses(logits, self.vocabulary)
            found[span] = torch.cat([-losses, *top_log_probabilities(logits, k, self.vocabulary)], -1)
        return found

    def logits(self, x: Tensor) -> Tensor:
        """The fp32 logits of activations `[tokens, width]`, of this rank's share of the vocabulary."""
        return _logits(x, self.weight, self.bias, self.rule).float()


@dataclass(frozen=True)
class Aim:
    """What the loss of a token is."""

    labels: Tensor  # int64 [tokens]; those that are IGNORE_INDEX are left out
    weights: Tensor | None = None  # fp32 [tokens], factors of the losses
    z_loss: float = 0.0  # factor of the squared log of the normaliser, added (Chowdhery et al. 2022, section 5)
    teacher: Teacher | None = None
    compiled: bool = False  # compute losses and gradients of labels by compiled kernels

    def losses(self, logits: Tensor, span: slice, vocabulary: Vocabulary | None) -> Tensor:
        """Of the tokens in `span`, fp64 `[chunk, 1]`."""
        return self._losses(logits, span, vocabulary, None)[0]

    def losses_and_slopes(
        self, logits: Tensor, span: slice, vocabulary: Vocabulary | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The same, and gradients by the logits, `[chunk, vocab]`: in `dtype` where that saves a pass, else in fp32."""
        if self.compiled and self.teacher is None:
            weights = None if self.weights is None else self.weights[span, None]
            return losses_and_slopes(logits, self.labels[span], vocabulary, self.z_loss, weights, dtype)
        losses, slopes = self._losses(logits, span, vocabulary, dtype)
        assert slopes is not None
        return losses, slopes

    def _losses(
        self, logits: Tensor, span: slice, vocabulary: Vocabulary | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        """Without a `dtype` no gradients."""
        softmax, gradient = Softmax.of(logits, self.labels[span], vocabulary), dtype is not None
        losses, log_sum = softmax.losses(logits, vocabulary)
        if self.z_loss:
            losses = losses + softmax.z_loss(log_sum, self.z_loss)
        alone = self.teacher is None and self.weights is None
        if dtype is not None and dtype != torch.float32 and logits.is_cuda and alone:
            return losses, softmax.rounded_gradient(log_sum, dtype, self.z_loss)
        slopes = softmax.gradient(log_sum, self.z_loss) if gradient else None
        if self.teacher is not None:
            mix = self.teacher.mix
            distances, towards = _distances(self.teacher, logits, self.labels[span], span, vocabulary, gradient)
            losses = losses.lerp_(distances, mix)
            slopes = None if slopes is None or towards is None else slopes.lerp_(towards, mix)
        if self.weights is not None:
            factors = self.weights[span, None]
            losses = losses * factors
            slopes = slopes if slopes is None else slopes.mul_(factors)
        return losses, slopes


def _distances(
    teacher: Teacher, logits: Tensor, labels: Tensor, span: slice, vocabulary: Vocabulary | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """temperature^2 x KL(teacher, student) of each token with a label, and its gradient by the logits."""
    temperature = teacher.temperature
    given = teacher.log_probabilities.flatten(0, 1)[span].double() / temperature
    logs = given - given.logsumexp(-1, keepdim=True)  # of the k tokens alone
    shares = logs.exp()
    tokens = teacher.tokens.flatten(0, 1)[span].long()
    scaled = logits if temperature == 1 else logits.float() / temperature
    softmax = Softmax.of(scaled, labels, vocabulary, tokens, shares.float())
    cross, log_sum = softmax.losses(scaled, vocabulary)
    entropy = torch.where(shares > 0, shares * logs, 0.0).sum(-1, keepdim=True)
    distances = (cross + entropy.where(softmax.valid, 0.0)) * temperature**2
    return distances, softmax.gradient(log_sum).mul_(temperature) if gradient else None


def summed_loss(
    hidden: Tensor,
    weight: Tensor,
    aim: Aim,
    chunk: int,
    vocabulary: Vocabulary | None = None,
    bias: Tensor | None = None,
    rule: Rule | None = None,
) -> Tensor:
    """The sum over tokens of the losses of `rule(hidden @ weight.T + bias)` that `aim` says: fp32 scalar.

    `hidden` is `[tokens, width]`, `weight` `[vocab, width]`. Softmax and sums are fp32 for every dtype; `chunk` tokens
    have logits at one time: another number is another order of the sums over tokens, as other micro-batches are.
    Between forward and backward it holds the gradients: one of the size of `hidden`, and one of `weight` in fp32.

    With a `vocabulary` `weight` and `bias` are this rank's share of it. All its ranks call with the same hidden and
    labels, and get the same loss; the gradient of `hidden` is this rank's part of a sum over them.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _SummedLoss.apply(hidden, weight, bias, aim, chunk, vocabulary, rule)
    total = torch.zeros((), device=hidden.device)
    for start in range(0, len(hidden), chunk):
        span = slice(start, start + chunk)
        total += aim.losses(_logits(hidden[span], weight, bias, rule), span, vocabulary).sum()
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
        aim: Aim,
        chunk: int,
        vocabulary: Vocabulary | None,
        rule: Rule | None,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradients = Gradients(hidden, weight, bias, ctx.needs_input_grad)
        # In fp32 where more is computed of them than products
        dtype = hidden.dtype if rule is None and bias is None else torch.float32
        for start in range(0, len(hidden), chunk):
            span = slice(start, start + chunk)
            raw, logits = _ruled(rule, _logits(hidden[span], weight, bias, None))
            losses, slopes = aim.losses_and_slopes(logits.detach(), span, vocabulary, dtype)
            total += losses.sum()
            gradients.add(span, _by_raw(rule, raw, logits, slopes))
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
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


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
            losses, log_sums[span] = Softmax.of(logits, labels[span], vocabulary).losses(logits, vocabulary)
            found[span] = -losses[:, 0]
        ctx.save_for_backward(hidden, weight, bias, labels, log_sums)
        ctx.chunk, ctx.vocabulary, ctx.rule = chunk, vocabulary, rule
        ctx.border = None if vocabulary is None else LEAVES
        return found

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, log_sums = ctx.saved_tensors
        gradients = Gradients(hidden, weight, bias, ctx.needs_input_grad)
        for start in range(0, len(hidden), ctx.chunk):
            span = slice(start, start + ctx.chunk)
            raw, logits = _ruled(ctx.rule, _logits(hidden[span], weight, bias, None))
            softmax = Softmax.of(logits.detach(), labels[span], ctx.vocabulary)
            grad_logits = softmax.gradient(log_sums[span]).mul_(-grad_output[span, None])
            gradients.add(span, _by_raw(ctx.rule, raw, logits, grad_logits))
        grad_weight, grad_bias = (
            None if gradient is None else gradient.to(weight.dtype) for gradient in (gradients.weight, gradients.bias)
        )
        return gradients.hidden, grad_weight, grad_bias, None, None, None, None


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
