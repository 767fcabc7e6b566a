"""What a teacher predicts for each label, and no loss: the objective of `stoker teach`."""

from __future__ import annotations

import torch
from torch import Tensor

from stoker.conf.schema import ObjectiveConfig
from stoker.parallel.batch import Batch
from stoker.parallel.objective import Loss

TARGET = "stoker.models.objectives.teaching:build"


class Teaching:
    """A `stoker.parallel.objective.Objective`. `top_k` tokens a label; with 0 the log-probability of the label."""

    scalars: tuple[str, ...] = ()
    per_token = True
    reference = False

    documents_together = 1

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def nominal(self, rows: int, seq_len: int) -> int:
        return rows * seq_len

    def count(self, batch: Batch) -> Tensor:
        return batch.valid_tokens()

    def loss(self, given: Tensor, batch: Batch) -> Loss:
        return Loss(torch.zeros((), device=given.device))


def build(config: ObjectiveConfig) -> Teaching:
    """With `top_k` in `objective.args`."""
    return Teaching(int(config.args.get("top_k", 0)))
