"""Forward and backward of a step's micro-batches: gradient accumulation here, a pipeline schedule in `pipeline`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from stoker.parallel.batch import Batch
from stoker.parallel.layout import BatchPlan
from stoker.parallel.sharding import ShardingStrategy


class ForwardBackward(Protocol):
    """Training and evaluation passes. All ranks of a replica call them together with the same rows."""

    def train(self, rows: Batch, factor: Tensor) -> Tensor:
        """Accumulate the gradients of `factor` (fp32 scalar) x the summed loss of `rows`, `[rank_rows, seq_len]`.

        Returns the sum of the token losses, fp64 scalar on the device; zero on ranks that do not have the head.
        """
        ...

    def evaluate(self, rows: Batch) -> Tensor:
        """The sum of the token losses as `train` returns it, for any number of rows, without gradients."""
        ...


class GradientAccumulation:
    """One micro-batch after the other through the whole model of `weights`.

    `document_mask`: keep attention inside documents.
    """

    def __init__(self, weights: ShardingStrategy, plan: BatchPlan, device: torch.device, document_mask: bool) -> None:
        self._model, self._weights = weights.module, weights
        self._micro_rows = plan.micro_rows
        self._device, self._document_mask = device, document_mask

    def train(self, rows: Batch, factor: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for start in range(0, len(rows), self._micro_rows):
            self._weights.on_backward_start(is_last=start + self._micro_rows >= len(rows))
            with record_function("stoker.forward"):
                loss = self._loss(rows[start : start + self._micro_rows])
            with record_function("stoker.backward"):
                (loss * factor).backward()
            total += loss.detach()
        return total

    def evaluate(self, rows: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        rows = rows.padded(self._micro_rows)  # sequence parallelism divides the tokens of a whole micro-batch
        with torch.no_grad():
            for start in range(0, len(rows), self._micro_rows):
                total += self._loss(rows[start : start + self._micro_rows])
        return total

    def _loss(self, micro: Batch) -> Tensor:
        micro = micro.to(self._device)
        documents = micro.documents if self._document_mask else None
        return self._model(micro.tokens, micro.positions, documents, micro.labels)
