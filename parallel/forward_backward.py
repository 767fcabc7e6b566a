"""Forward and backward of a step's micro-batches: gradient accumulation here, a pipeline schedule in `pipeline`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from stoker.parallel.batch import Batch
from stoker.parallel.documents import bounded, document_layers
from stoker.parallel.layout import BatchPlan
from stoker.parallel.objective import NEXT_TOKEN, Objective, shaped, targets_of
from stoker.parallel.sharding import ShardingStrategy
from stoker.parallel.tensor.dropout import token_numbers


class ForwardBackward(Protocol):
    """Training and evaluation passes. All ranks of a replica call them together with the same rows."""

    def train(self, rows: Batch, factor: Tensor) -> Tensor:
        """Accumulate the gradients of `factor` (fp32 scalar) x the summed loss of `rows`, `[rank_rows, seq_len]`.

        Returns the sums of the losses and of the objective's scalars, fp64 `[1 + scalars]` on the device; zeros on
        ranks that do not have the head.
        """
        ...

    def evaluate(self, rows: Batch) -> Tensor:
        """The sums as `train` returns them, for any number of rows, without gradients."""
        ...

    def log_probabilities(self, rows: Batch, objective: Objective | None = None) -> Tensor | None:
        """Of each label of any number of rows, without gradients: fp32 `[rows, seq_len]` on the device.

        None on ranks that do not have the head. For an objective with `per_token`, by default the one of training; with
        `top_k` it is what `Targets.top_k` asks for, `[rows, seq_len, 1 + 2 k]`.
        """
        ...


class GradientAccumulation:
    """One micro-batch after the other through the whole model of `weights`.

    `document_mask`: keep attention inside documents.
    """

    def __init__(
        self,
        weights: ShardingStrategy,
        plan: BatchPlan,
        device: torch.device,
        document_mask: bool,
        objective: Objective = NEXT_TOKEN,
    ) -> None:
        self._model, self._weights, self._objective = weights.module, weights, objective
        self._micro_rows, self._tokens = plan.micro_rows, token_numbers(weights.module)
        self._device, self._document_mask = device, document_mask
        self._documents = document_layers(weights.module) if document_mask else []

    def train(self, rows: Batch, factor: Tensor) -> Tensor:
        with bounded(self._documents, rows.documents, self._device):
            return self._train(rows, factor)

    def _train(self, rows: Batch, factor: Tensor) -> Tensor:
        sums = self._zeros()
        for start in range(0, len(rows), self._micro_rows):
            self._weights.on_backward_start(is_last=start + self._micro_rows >= len(rows))
            micro = rows[start : start + self._micro_rows].to(self._device)
            with record_function("stoker.forward"):
                loss = self._objective.loss(self._given(micro), micro)
            with record_function("stoker.backward"):
                (loss.sum * factor).backward()
            sums += loss.sums()
        return sums

    def evaluate(self, rows: Batch) -> Tensor:
        sums = self._zeros()
        with torch.no_grad(), bounded(self._documents, rows.documents, self._device):
            for micro in self._whole_micro_batches(rows):
                sums += self._objective.loss(self._given(micro), micro).sums()
        return sums

    def log_probabilities(self, rows: Batch, objective: Objective | None = None) -> Tensor:
        with torch.no_grad(), bounded(self._documents, rows.documents, self._device):
            found = [self._given(micro, objective) for micro in self._whole_micro_batches(rows)]
        return torch.cat(found)[: len(rows)]

    def _whole_micro_batches(self, rows: Batch) -> Iterator[Batch]:
        rows = rows.padded(self._micro_rows)  # sequence parallelism divides the tokens of a whole micro-batch
        for start in range(0, len(rows), self._micro_rows):
            yield rows[start : start + self._micro_rows].to(self._device)

    def _given(self, micro: Batch, objective: Objective | None = None) -> Tensor:
        """What the head returns for rows on the device."""
        objective = objective or self._objective
        documents = micro.documents if self._document_mask else None
        targets = targets_of(
            objective, micro.labels, micro.weights, micro.teacher_tokens, micro.teacher_log_probabilities
        )
        with self._tokens.of(micro.numbers) if self._tokens is not None else nullcontext():
            given = self._model(micro.tokens, micro.positions, documents, targets)
        return shaped(objective, given, micro.labels)

    def _zeros(self) -> Tensor:
        return torch.zeros(1 + len(self._objective.scalars), dtype=torch.float64, device=self._device)
