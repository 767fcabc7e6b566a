"""Activations to the loss, without the logits of more than one chunk of tokens at a time.

For a vocabulary of 128k the fp32 logits of 8192 tokens are 4 GB, several times over in backward. The gradient of a
cross entropy is known as soon as its logits are, so it is taken in the forward pass, chunk by chunk, and backward only
scales it (the fused linear cross entropy of Liger Kernel, Hsu et al. 2024, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.rows import IGNORE


class Head(nn.Module):
    """The output projection and the loss. `weight` is `[vocab, width]`; a tied model puts its embedding's there."""

    def __init__(self, weight: nn.Parameter, chunk: int) -> None:
        super().__init__()
        self.weight = weight
        self.chunk = chunk

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The summed loss (fp32 scalar) of activations `[tokens, width]`; without labels the fp32 logits."""
        if labels is None:
            return (x @ self.weight.T).float()
        return summed_loss(x, self.weight, labels.flatten(), self.chunk)


def summed_loss(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """The sum over tokens of the cross entropy of `hidden @ weight.T`: fp32 scalar.

    `hidden` is `[tokens, width]`, `weight` `[vocab, width]`, `labels` int64 `[tokens]`, those that are IGNORE left
    out. Softmax and sums are fp32 whatever the dtype; `chunk` tokens have logits at one time. Between forward and
    backward it holds the gradients: one of the size of `hidden`, and one of `weight` in fp32.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _SummedLoss.apply(hidden, weight, labels, chunk)
    total = torch.zeros((), device=hidden.device)
    for rows, wanted in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total += _chunk_loss(_log_softmax(rows @ weight.T), wanted)
    return total


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), chunk):
            rows, wanted = hidden[start : start + chunk], labels[start : start + chunk]
            log_probabilities = _log_softmax(rows @ weight.T)
            total += _chunk_loss(log_probabilities, wanted)
            grad_logits = _chunk_gradient(log_probabilities, wanted).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + chunk])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_output.to(grad_hidden.dtype)
        if grad_weight is not None:
            # Scaled before it is cast: a sum over many tokens need not fit into fp16.
            grad_weight = (grad_weight * grad_output).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None


def _log_softmax(logits: Tensor) -> Tensor:
    """fp32 `[chunk, vocab]`."""
    return logits.log_softmax(-1, dtype=torch.float32)


def _chunk_loss(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(log_probabilities, labels, ignore_index=IGNORE, reduction="sum")


def _chunk_gradient(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """softmax - onehot(labels), zero where the label is IGNORE: fp32 `[chunk, vocab]`."""
    valid = (labels != IGNORE).to(torch.float32)[:, None]
    grad_output = torch.zeros_like(log_probabilities).scatter_(-1, labels.clamp(min=0)[:, None], -valid)
    return torch._log_softmax_backward_data(grad_output, log_probabilities, -1, torch.float32)
