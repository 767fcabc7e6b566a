"""A model whose loss is never finite."""

from __future__ import annotations

from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.parallel.model import Part
from tests.toy import Toy


class Broken(Toy):
    def forward(self, x: Tensor, positions: Tensor, documents: Tensor | None, labels: Tensor | None = None) -> Tensor:
        return super().forward(x, positions, documents, labels) * float("inf")


def build(config: ModelConfig, part: Part) -> nn.Module:
    return Broken(config, part)
