"""A user's model with experts: the decoder, its feed-forward networks of a router and `Experts`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.models.decoder import Decoder
from stoker.parallel.experts import Experts
from stoker.parallel.model import Part

EXPERTS, CHOICES, HIDDEN = 8, 2, 24


class Sparse(nn.Module):
    """`skew` is added to the scores of the first experts, which then take every token: of each `choices`."""

    def __init__(self, width: int, skew: float, experts: int, choices: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = Experts(experts, width, HIDDEN)
        self.skew, self.choices = skew, choices

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x.float(), self.router.weight.float())
        scores, preferred = logits.softmax(-1), torch.arange(logits.shape[1], device=x.device) < self.choices
        chosen = (logits + self.skew * preferred).topk(self.choices).indices
        weights = scores.gather(1, chosen)
        return self.experts(x, chosen, weights / weights.sum(-1, keepdim=True) if self.choices > 1 else weights)


class SparseDecoder(Decoder):
    """The first layer is dense if `model.args.dense` says so."""

    def __init__(self, config: ModelConfig, part: Part) -> None:
        super().__init__(config, part)
        for number, block in self.layers.items():
            if number != "0" or not config.args.get("dense"):
                experts, choices = config.args.get("experts", EXPERTS), config.args.get("choices", CHOICES)
                block.mlp = Sparse(config.hidden_size, config.args.get("skew", 0.0), experts, choices)


def build(config: ModelConfig, part: Part) -> nn.Module:
    return SparseDecoder(config, part)
