"""The dynamic loss scale of fp16 (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2).

Gradients too small for fp16 vanish, so the loss is multiplied by a scale and the gradients are divided by it. Where the
scaled gradients overflow, the update is left out and the scale halved; after enough updates in a row it is doubled.
The overflow flag is reduced over all ranks (`stoker.parallel.update`), so the scale is equal everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST = 2.0**16
FLOOR = 1.0  # at the floor a gradient that is not finite is no longer an overflow but a bad step
GROWTH, BACKOFF = 2.0, 0.5
GROWS_AFTER = 1000  # updates in a row


class LossScale:
    """The scale, on the device: nothing here waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), FIRST, device=device)
        self._updates = torch.zeros((), device=device)  # in a row, since the scale changed

    def adjust(self, overflowed: Tensor, skipped: Tensor) -> None:
        """After a step, of flags (fp32 scalars) that are equal on all ranks.

        `skipped` is 1 where the update was left out, `overflowed` where the reason was an overflow of scaled gradients.
        A step skipped for another reason (a spike, a batch without labels, a loss that is not finite) does not change
        the scale.
        """
        self._updates = torch.where(overflowed > 0, 0.0, self._updates + (1 - skipped))
        grows = self._updates >= GROWS_AFTER
        self._updates = torch.where(grows, 0.0, self._updates)
        factor = torch.where(overflowed > 0, BACKOFF, torch.where(grows, GROWTH, 1.0))
        self.value = (self.value * factor).clamp(min=FLOOR, max=torch.finfo(torch.float32).max)

    def state(self) -> dict[str, float]:
        return {"loss_scale": self.value.item(), "loss_scale_updates": self._updates.item()}

    def load_state(self, state: dict[str, float]) -> None:
        """The inverse of `state`; a state without a scale (of a run in another precision) starts from FIRST."""
        self.value.fill_(state.get("loss_scale", FIRST))
        self._updates.fill_(state.get("loss_scale_updates", 0.0))
