"""A mixture of experts in the place of a block's MLP: the router, the experts, and those that all tokens share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.models.feed_forward import Mlp, expert_width
from stoker.parallel.experts import Experts, tokens_per_expert
from stoker.parallel.experts.balance import RoutedLayer, with_loss
from stoker.parallel.registry import Entry
from stoker.parallel.sequence import SequenceLayer
from stoker.parallel.tensor.axis import TensorAxis
from stoker.parallel.tensor.layers import TensorLayer

_LEAST_SUM = 1e-20  # of the weights of a token's experts, which are divided by it


class Router(nn.Module):
    """Chooses the experts of each token. Its product and all that follows is in fp32, whatever the precision."""

    bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.chosen, self.kind, self.normalised = config.num_experts_per_tok, config.router, config.norm_topk_prob
        self.groups, self.scaling = (config.n_group, config.topk_group), config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts) if config.router_bias else None
        self.register_buffer("bias", bias)  # of the scores in the choice of experts, not in their weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For `x` `[tokens, width]` the experts of each token, int64 `[tokens, k]`, and their weights, fp32.

        Then the logits and the scores that all of them are made of, fp32 `[tokens, experts]`.
        """
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.softmax(-1) if self.kind == "softmax" else logits.sigmoid()
        ranked = scores.detach()
        if self.bias is not None:
            ranked = ranked + self.bias.float()
        chosen = in_groups(ranked, *self.groups).topk(self.chosen, -1).indices
        weights = scores.gather(1, chosen)
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + _LEAST_SUM)
        return chosen, weights if self.scaling == 1 else weights * self.scaling, logits, scores


def in_groups(ranked: Tensor, groups: int, chosen: int) -> Tensor:
    """`ranked` `[tokens, experts]`, minus infinity but for the experts of so many `chosen` of equal `groups`.

    Those whose two highest scores have the highest sum (DeepSeek-V3, 2.1.2).
    """
    if groups == chosen:
        return ranked
    by_group = ranked.unflatten(-1, (groups, -1))
    best = by_group.topk(2, -1).values.sum(-1).topk(chosen, -1).indices
    left_out = torch.ones(by_group.shape[:2], dtype=torch.bool, device=ranked.device).scatter_(1, best, False)
    return by_group.masked_fill(left_out[..., None], float("-inf")).flatten(1)


class SequenceBalance(TensorLayer, SequenceLayer):
    """The balance loss of each sequence (DeepSeek-V3, equations 17 to 20), summed over tokens.

    Of a token it is `sum_i f_i p_i`: f_i is the share of expert i of the choices of the token's sequence, times the
    number of experts, and p_i the token's score of it as a share of its scores. A sequence is one for all ranks that
    have tokens of it, so that the value depends on no layout.
    """

    tensor: TensorAxis | None = None

    def cut(self, axis: TensorAxis) -> list[Entry]:
        self.tensor = axis if axis.sequence else None
        return []

    def forward(self, chosen: Tensor, scores: Tensor, rows: int, seq_len: int) -> Tensor:
        """fp32 scalar, of this rank's tokens: its share of each of `rows` sequences, `seq_len` tokens of each."""
        tokens, experts = scores.shape
        start = 0 if self.tensor is None else self.tensor.rank * tokens
        row = (torch.arange(tokens, device=scores.device) + start) // seq_len
        counts = torch.zeros(rows, experts, device=scores.device)
        with torch.no_grad():
            counts.view(-1).scatter_add_(
                0, (row[:, None] * experts + chosen).flatten(), torch.ones_like(chosen, dtype=torch.float32).flatten()
            )
            for axis in (self.tensor, self.sequence):
                if axis is not None:
                    counts = _summed(counts, axis.group_name)
            shares = counts * (experts / counts.sum(-1, keepdim=True).clamp(min=1.0))
        return (shares[row] * (scores / scores.sum(-1, keepdim=True))).sum()


def _summed(x: Tensor, group_name: str) -> Tensor:
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(x, "sum", group_name))


class SparseMlp(RoutedLayer):
    """A mixture of experts (Shazeer et al. 2017), none of whose tokens is dropped, and experts that all tokens share.

    Outside tensor-parallel regions: every rank computes the tokens that it holds there, with whole experts. The
    shared experts are a region of their own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.num_experts)
        width, hidden = config.hidden_size, expert_width(config)
        self.router = Router(config)
        self.experts = Experts(config.num_experts, width, hidden)
        shared = config.num_shared_experts
        self.shared = Mlp(width, hidden * shared) if shared else None
        self.balance = SequenceBalance()
        self.coefficients = (config.router_aux_loss_coef, config.router_z_loss_coef)

    @property
    def bias(self) -> Tensor | None:
        return self.router.bias

    def reset(self) -> None:
        super().reset()
        if self.router.bias is not None:
            self.router.bias.zero_()

    def forward(self, x: Tensor, rows: int, seq_len: int) -> Tensor:
        """`x` and the result are `[tokens, width]`, of `rows` sequences, `seq_len` tokens of each on this rank."""
        chosen, weights, logits, scores = self.router(x)
        of_balance, of_z = self.coefficients
        losses = torch.zeros(2, device=x.device)
        if self.training and (of_balance or of_z):
            zero = logits.new_zeros(())
            balance = of_balance * self.balance(chosen, scores, rows, seq_len) if of_balance else zero
            z = of_z * logits.logsumexp(-1).square().sum() if of_z else zero
            weights = with_loss(weights, balance + z, self.loss_factor)
            losses = torch.stack([balance, z]).detach()
        self.latest = tokens_per_expert(chosen, self.experts.num), losses
        out = self.experts(x, chosen, weights)
        return out if self.shared is None else out + self.shared(x)
