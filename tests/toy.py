"""A user's own model, to show and test the protocol of `parallel.model`: a bag of previous tokens and two layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import ModelConfig
from parallel.model import Constant, Normal, Part
from parallel.rows import IGNORE


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))


class Toy(nn.Module):
    def __init__(self, config: ModelConfig, part: Part) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.embedding = nn.Embedding(config.vocab_size, config.width) if part.embedding else None
        self.layers = nn.ModuleDict({str(n): Layer(config.width) for n in part.layers})
        self.head = nn.Linear(config.width, config.vocab_size) if part.head else None

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor | None, labels: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            hidden = self.embedding(x)
            steps = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=hidden.dtype)
            x = (hidden.cumsum(1) / steps[:, None]).flatten(0, 1)
        for layer in self.layers.values():
            x = layer(x)
        if self.head is None:
            return x
        assert labels is not None
        return F.cross_entropy(self.head(x).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")

    def blocks(self) -> dict[str, nn.Module]:
        return dict(self.layers.items())

    def initial(self, name: str) -> Normal | Constant:
        return Constant(0.0) if name.endswith("bias") else Normal(0.05)

    def rebuild_buffers(self) -> None:
        pass


def build(config: ModelConfig, part: Part) -> nn.Module:
    return Toy(config, part)
