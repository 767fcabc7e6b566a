"""The decoder whose loss, and then whose gradients, are far too large in one step each: its target is `build`."""

from __future__ import annotations

from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.models.decoder import Decoder
from stoker.parallel.model import Part

LOSS, NORM = 26, 29  # steps
FACTOR = 100.0


class Spiking(Decoder):
    calls = 0  # of training, one for each step

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor | None, labels: Tensor | None = None) -> Tensor:
        loss = super().forward(x, positions, documents, labels)
        self.calls += self.training
        if self.calls == LOSS:
            return loss + (FACTOR - 1) * loss.detach()
        return FACTOR * loss - (FACTOR - 1) * loss.detach() if self.calls == NORM else loss


def build(config: ModelConfig, part: Part) -> nn.Module:
    return Spiking(config, part)
