"""The decoder whose loss, and then whose gradients, are far too large in one step each: its target is `build`.

Its gradients are a thousandth of a decoder's, so that no usual loss is below a ceiling of the norm.
"""

from __future__ import annotations

from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.models.decoder import Decoder
from stoker.parallel.model import Part

LOSS, NORM = 26, 29  # steps
FACTOR = 100.0
USUAL = 1e-3  # of the gradients


class Spiking(Decoder):
    calls = 0  # of training, one for each step

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor | None, labels: Tensor | None = None) -> Tensor:
        loss = super().forward(x, positions, documents, labels)
        self.calls += self.training
        value = FACTOR * loss.detach() if self.calls == LOSS else loss.detach()
        factor = FACTOR * USUAL if self.calls == NORM else USUAL
        return value + factor * (loss - loss.detach())


def build(config: ModelConfig, part: Part) -> nn.Module:
    return Spiking(config, part)
