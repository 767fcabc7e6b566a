"""A step that is left out, by arithmetic on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """What makes a step of one device nothing where `found_inf` is 1. All are fp32 or bool scalars there."""

    divisor: Tensor
    skipped: Tensor  # bool
    taken: Tensor  # 1.0, or 0.0 where the step is left out

    def gradient(self, gradient: Tensor) -> Tensor:
        """A new tensor: `gradient` / divisor, zeros where the step is left out."""
        return (gradient / self.divisor).masked_fill_(self.skipped, 0.0)

    def factor(self, value: float) -> Tensor:
        """`value` by which a state is multiplied; 1 where the step is left out."""
        return torch.where(self.skipped, 1.0, value)


class Gates:
    """The gates of one step: parts may be offloaded, so each device that has some gets its own, once."""

    def __init__(self, divisor: Tensor, found_inf: Tensor) -> None:
        self._divisor, self._found_inf = divisor, found_inf
        self._made: dict[torch.device, Gate] = {}

    def on(self, device: torch.device) -> Gate:
        if device not in self._made:
            found_inf = self._found_inf.to(device)
            self._made[device] = Gate(self._divisor.to(device), found_inf > 0, 1.0 - found_inf)
        return self._made[device]
