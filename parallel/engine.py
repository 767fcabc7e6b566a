"""The protocol that hides ZeRO from the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from stoker.parallel.batch import Batch
from stoker.parallel.objective import Objective
from stoker.parallel.shards import Shard
from stoker.parallel.update import NO_FLAGS, StepFlags, StepResult


class Engine(Protocol):
    """A model over a mesh with its optimizer. Every rank makes the same calls in the same order."""

    def forward_backward(self, rows: Batch, first_row: int | None = None) -> None:
        """Accumulate the gradients of this rank's rows of the global batch, `[rank_rows, seq_len]`.

        `first_row` is the number in the run of the first row of the global batch, from which dropout follows: raises
        ValueError without it where there is dropout.
        """
        ...

    def update(self, lr: float, flags: StepFlags = NO_FLAGS) -> StepResult:
        """Clip and step with the accumulated gradients; add this rank's `flags` to the step's all-reduce.

        A step whose loss and gradient norm are not finite, or above the ceilings, which are equal on all ranks, leaves
        parameters and optimizer state as they are, on all ranks alike. The result stays on the device until it is read.
        """
        ...

    def gpu_seconds(self) -> float:
        """Once a step: seconds that this rank's GPU computed in the last step that it has finished, else 0. Waits for
        nothing.
        """
        ...

    def evaluate(self, rows: Batch) -> Tensor:
        """Of this rank's rows the sum of the losses, what it is divided by (the number of valid tokens, or the
        objective's count), and the sums of the objective's scalars: float64 `[2 + scalars]`, no gradients kept.
        """
        ...

    def with_baseline(self, parts: Sequence[Batch]) -> list[Batch]:
        """`parts` of this rank's rows, with the objective's baseline over all of them on all ranks, if it has one.

        A collective. `evaluate` of rows without a baseline takes that of these rows alone.
        """
        ...

    def predict(self, rows: Batch, objective: Objective | None = None) -> Tensor | None:
        """What the head returns for each label of any number of rows with an objective of `per_token`, without
        gradients: `[rows, seq_len]`, or as `Targets.top_k` says. One rank of each replica has it, the others get None.

        `objective`: in the place of the engine's.
        """
        ...

    def modules(self) -> list[nn.Module]:
        """The stages of this rank, for hooks: their modules have the global names of the model."""
        ...

    def shards(self) -> list[Shard]:
        """Parameters, persistent buffers and optimizer state of this rank, as live chunks of global tensors."""
        ...

    def shards_written(self) -> None:
        """The data of `shards()` were changed from outside: update everything derived from them.

        A collective. Accumulated gradients are dropped.
        """
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Between `update` and `forward_backward`, with `optim.ema`: inside, the parameters are their average.

        A collective. No snapshot may be in flight.
        """
        ...

    def gradient_shards(self) -> list[Shard]:
        """Between `forward_backward` and `update`: the gradients of the summed loss of the global batch, as copies."""
        ...

    def without_gradient(self) -> list[str]:
        """Between `forward_backward` and `update`: names of trained parameters whose whole gradient is exactly zero.

        A collective that waits for the device; equal on all ranks, sorted.
        """
        ...

    def state(self) -> dict[str, float]:
        """What is not a tensor per parameter, equal on all ranks and free of the layout (waits for the device)."""
        ...

    def load_state(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        ...
