"""A moving average of the trained parameters, kept on the part that each rank holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

AVERAGE = "ema"  # the key of its state in checkpoints
UPDATES = "ema_updates"


class Average:
    """a <- d a + (1 - d) w after each update, in fp32; d is `decay`, in the first updates t only (t - 1) / (t + 9), so
    that the average begins with the parameters after the first one (as TensorFlow's ExponentialMovingAverage).

    `parts` are this rank's, live.
    """

    def __init__(self, decay: float, parts: Mapping[str, Tensor]) -> None:
        self._decay, self._parts = decay, {name: part for name, part in parts.items() if part.numel()}
        self._values = {name: torch.zeros_like(part) for name, part in self._parts.items()}
        device = next(iter(self._parts.values())).device if self._parts else torch.device("cpu")
        self._updates = torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """The parameters have changed, unless `found_inf` is 1."""
        found_inf = found_inf.to(self._updates.device)
        self._updates += 1.0 - found_inf
        decay = ((self._updates - 1.0) / (self._updates + 9.0)).clamp(max=self._decay)
        decay = torch.where(found_inf > 0, 1.0, decay)
        for name, value in self._values.items():
            value.mul_(decay).add_(self._parts[name] * (1.0 - decay))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the parameters."""
        for name, value in self._values.items():
            held = self._parts[name].clone()
            self._parts[name].copy_(value)
            value.copy_(held)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, value in self._values.items():
            yield name, AVERAGE, value

    def scalars(self) -> dict[str, float]:
        return {UPDATES: float(self._updates)}

    def load_scalars(self, values: Mapping[str, float]) -> None:
        self._updates.fill_(values.get(UPDATES, 0.0))
