"""The protocol behind which ZeRO lives."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from stoker.parallel.batch import Batch
from stoker.parallel.shards import Shard
from stoker.parallel.update import NO_FLAGS, StepFlags, StepResult


class Engine(Protocol):
    """A model over a mesh with its optimizer. Every rank makes the same calls in the same order."""

    def forward_backward(self, rows: Batch) -> None:
        """Accumulate the gradients of this rank's rows of the global batch, `[rank_rows, seq_len]`."""
        ...

    def update(self, lr: float, said: StepFlags = NO_FLAGS) -> StepResult:
        """Clip and step with what was accumulated, and carry what this rank has `said` to all ranks.

        A step whose loss and gradient norm are not finite, or above the ceilings that all ranks name alike, leaves
        parameters and optimizer state as they are, on all ranks alike. The result stays on the device until it is read.
        """
        ...

    def evaluate(self, rows: Batch) -> Tensor:
        """Sum of the token losses and number of valid tokens of this rank's rows: float64 `[2]`, no gradients kept."""
        ...

    def shards(self) -> list[Shard]:
        """Every parameter and optimizer state tensor of this rank as live chunks of global tensors."""
        ...

    def shards_written(self) -> None:
        """The data of `shards()` were changed from outside: bring whatever is derived from them up to date.

        A collective. Gradients that are under way are dropped.
        """
        ...

    def gradient_shards(self) -> list[Shard]:
        """Between `forward_backward` and `update`: the gradients of the summed loss of the global batch, as copies."""
        ...

    def state(self) -> dict[str, float]:
        """What is not a tensor per parameter, equal on all ranks and free of the layout (waits for the device)."""
        ...

    def load_state(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        ...
