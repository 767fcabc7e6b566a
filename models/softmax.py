"""Softmax and cross entropy of a chunk of tokens, over a vocabulary that tensor-parallel ranks may share.

No logit leaves its rank. Two numbers per token do: the logarithm of the rank's sum of exponentials, and what the
targets take of its logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stoker.parallel.batch import IGNORE_INDEX
from stoker.parallel.tensor.layers import Vocabulary
from stoker.parallel.tensor.regions import all_gather


@dataclass(frozen=True)
class Softmax:
    """Of a chunk of tokens, over this rank's share of the vocabulary, beside what each token should be.

    That is one label, or `k` tokens of which each has a `share`; shares sum to 1.
    """

    values: Tensor  # fp32 [chunk, vocab]
    log_sum: Tensor  # fp64 [chunk, 1], of the exponentials
    wanted: Tensor  # int64 [chunk, k], the targets by their places in the rank's share
    mine: Tensor  # bool [chunk, k], whether the target is in it
    valid: Tensor  # bool [chunk, 1], whether there is a label: not IGNORE_INDEX
    shares: Tensor | None = None  # fp32 [chunk, k]; None: k is 1, and so is the share

    @classmethod
    def of(
        cls,
        logits: Tensor,
        labels: Tensor,
        vocabulary: Vocabulary | None,
        tokens: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Softmax:
        """`labels` are int64 `[chunk]`; `tokens` (int64 `[chunk, k]`) with `shares` are targets in their place."""
        valid = (labels != IGNORE_INDEX)[:, None]
        wanted = labels[:, None].masked_fill(~valid, 0) if tokens is None else tokens
        wanted, mine = (wanted, valid) if vocabulary is None else vocabulary.own(wanted)
        softmax = logits.softmax(-1, dtype=torch.float32)
        largest, at = logits.max(-1, keepdim=True)
        # fp64: a loss is the small difference of large logits
        log_sum = largest.double() - softmax.gather(-1, at).double().log()
        return cls(softmax, log_sum, wanted, mine, valid, shares)

    def z_loss(self, log_sum: Tensor, factor: float) -> Tensor:
        """`factor` x the square of `log_sum`, that of the whole vocabulary: fp64 `[chunk, 1]`, zero without a label."""
        return factor * log_sum.square().where(self.valid, 0.0)

    def gradient(self, log_sum: Tensor, z_loss: float = 0.0) -> Tensor:
        """Of the loss by the logits: softmax - targets, zero without a label. It takes the place of `values`.

        `log_sum` is that of the whole vocabulary; `z_loss` the factor of its square in the loss.
        """
        return self.values.mul_(self._share(log_sum, z_loss)).scatter_add_(-1, self.wanted, -self._targets())

    def rounded_gradient(self, log_sum: Tensor, dtype: torch.dtype, z_loss: float = 0.0) -> Tensor:
        """`gradient` rounded to `dtype`, bit by bit, for one target a token: one pass over the logits in place of two.

        `values` stay. On CPUs, which cast in a pass of their own, it saves nothing.
        """
        assert self.shares is None
        share = self._share(log_sum, z_loss)
        own = self.values.gather(-1, self.wanted).mul_(share).sub_(self._targets())
        found = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        return torch.mul(self.values, share, out=found).scatter_(-1, self.wanted, own.to(dtype))

    def _share(self, log_sum: Tensor, z_loss: float) -> Tensor:
        """What the probabilities are multiplied by, fp32 `[chunk, 1]`: the rank's share of all, 1 for a whole one."""
        share = (self.log_sum - log_sum).exp().where(self.valid, 0.0).float()
        return share * (1.0 + 2.0 * z_loss * log_sum).float() if z_loss else share

    def _targets(self) -> Tensor:
        targets = (self.mine & self.valid).float()
        return targets if self.shares is None else targets * self.shares

    def losses(self, logits: Tensor, vocabulary: Vocabulary | None) -> tuple[Tensor, Tensor]:
        """The cross entropy of each token's targets, and `log_sum` of the whole vocabulary: fp64 `[chunk, 1]` each."""
        target = logits.gather(-1, self.wanted).double()
        if vocabulary is not None:
            target = target.where(self.mine, 0.0)
        if self.shares is not None:
            target = (target * self.shares).sum(-1, keepdim=True)
        log_sum, target = of_all_ranks(self.log_sum, target, vocabulary)
        return (log_sum - target).where(self.valid, 0.0), log_sum


def of_all_ranks(log_sum: Tensor, target: Tensor, vocabulary: Vocabulary | None) -> tuple[Tensor, Tensor]:
    """Both of the whole vocabulary, from those of this rank's share of it: fp64 `[chunk, 1]` each. A message."""
    if vocabulary is None:
        return log_sum, target
    message = torch.cat([log_sum, target], -1)
    axis = vocabulary.axis
    of_ranks = all_gather(message, axis.group_name, axis.size).view(axis.size, *message.shape)
    return of_ranks[:, :, :1].logsumexp(0), of_ranks[:, :, 1:].sum(0)


_IDS = 1 << 31  # more than any vocabulary has


def top_log_probabilities(logits: Tensor, k: int, vocabulary: Vocabulary | None) -> tuple[Tensor, Tensor]:
    """The `k` most probable tokens of each row of `logits`, and their log-probabilities: int64 and fp64 `[chunk, k]`.

    `logits` are of this rank's share of the vocabulary. Of equal ones, which bf16 has many of, the smaller number comes
    first, however ranks share them.
    """
    none = torch.full(logits.shape[:1], IGNORE_INDEX, device=logits.device)
    log_sum = Softmax.of(logits, none, None).log_sum
    values = logits.float()
    bits = values.view(torch.int32).long()
    ordered = torch.where(bits >= 0, bits, -(bits & (_IDS - 1)))  # as the numbers are
    first = 0 if vocabulary is None else vocabulary.share.start
    ids = torch.arange(first, first + values.shape[1], device=values.device)
    keys, places = (ordered * _IDS + (_IDS - 1 - ids)).topk(min(k, values.shape[1]))
    tokens, values = places + first, values.gather(-1, places).double()
    if vocabulary is not None:
        axis, missing = vocabulary.axis, k - keys.shape[1]  # a rank may hold fewer than k
        keys = F.pad(keys, (0, missing), value=torch.iinfo(torch.int64).min)
        numbers = torch.cat([log_sum, F.pad(values, (0, missing))], -1)
        keys = all_gather(keys, axis.group_name, axis.size).view(axis.size, -1, k).transpose(0, 1).flatten(1)
        of_ranks = all_gather(numbers, axis.group_name, axis.size).view(axis.size, *numbers.shape)
        log_sum, values = of_ranks[:, :, :1].logsumexp(0), of_ranks[:, :, 1:].transpose(0, 1).flatten(1)
        keys, places = keys.topk(k)
        tokens, values = _IDS - 1 - keys % _IDS, values.gather(-1, places)
    return tokens, values - log_sum
