"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", Algorithm 2): the sign of a moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from stoker.parallel.rules.settings import Settings
from stoker.parallel.rules.skipping import Gates


class Lion:
    """An `UpdateRule`. c = b1 m + (1 - b1) g; w <- w (1 - lr d) - lr sign(c); m <- b2 m + (1 - b2) g."""

    def __init__(self, parts: Mapping[str, Tensor], settings: Mapping[str, Settings]) -> None:
        self._parts, self._settings = parts, settings
        self._moments = {name: torch.zeros_like(part) for name, part in parts.items()}

    @torch.no_grad()
    def begin(self, gradients: Mapping[str, Tensor], lr: float, divisor: Tensor, found_inf: Tensor) -> None:
        gates = Gates(divisor, found_inf)
        for name, part in self._parts.items():
            gate, own, moment = gates.on(part.device), self._settings[name], self._moments[name]
            (beta1, beta2), rate = own.betas, lr * own.rate
            gradient = gate.gradient(gradients[name])
            direction = (moment * beta1).add_(gradient, alpha=1 - beta1).sign_()
            if own.decay:
                part.mul_(1.0 - rate * own.decay * gate.taken)
            part.sub_(direction.mul_(rate * gate.taken))
            moment.mul_(gate.factor(beta2)).add_(gradient, alpha=1 - beta2)

    def finish(self) -> None:
        pass

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, moment in self._moments.items():
            yield name, "exp_avg", moment

    def scalars(self) -> dict[str, float]:
        return {}

    def load_scalars(self, values: dict[str, float]) -> None:
        pass
