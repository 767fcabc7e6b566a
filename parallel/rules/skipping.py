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

    @staticmethod
    def of(divisor: Tensor, found_inf: Tensor, device: torch.device) -> Gate:
        found_inf = found_inf.to(device)
        return Gate(divisor.to(device), found_inf > 0, 1.0 - found_inf)

    def gradient(self, gradient: Tensor) -> Tensor:
        """A new tensor: `gradient` / divisor, zeros where the step is left out."""
        return (gradient / self.divisor).masked_fill_(self.skipped, 0.0)

    def factor(self, value: float) -> Tensor:
        """`value` by which a state is multiplied; 1 where the step is left out."""
        return torch.where(self.skipped, 1.0, value)
