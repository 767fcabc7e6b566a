"""What a step minimises: the seam between the head of a model and the update.

    rows ──► model ──► head: the summed loss, or each label's log-probability ──► Objective.loss ──► backward
                                                                            └──► sums in the step's all-reduce

The gradient of a step, its loss and its scalars are the sums over all rows of the global batch over `count` of them:
a mean over the tokens, or over the pairs, of all ranks and micro-batches. So an objective adds over the rows that it is
given, and never averages over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from stoker.parallel.batch import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class Teacher:
    """What another model predicts for each label: its `k` most probable tokens there, from `stoker teach`.

    The loss of a label is mix x temperature^2 x KL(teacher, student) + (1 - mix) x cross entropy, both distributions at
    that temperature, and the teacher's over its `k` tokens alone (Hinton et al. 2015, section 2).
    """

    tokens: Tensor  # int32 [rows, seq_len, k]
    log_probabilities: Tensor  # fp32 [rows, seq_len, k]
    temperature: float = 1.0
    mix: float = 1.0


@dataclass(frozen=True)
class Targets:
    """In the place of `labels` (int64 `[rows, seq_len]`) for a head that is to return more than the sum of its losses.

    A model passes it on to its head unread.
    """

    labels: Tensor
    weights: Tensor | None = None  # fp32 [rows, seq_len], factor of each label's loss in the sum
    per_token: bool = False  # return the log-probability of each label, fp32 [rows x seq_len], 0 where there is none
    z_loss: float = 0.0  # in training: added to each label's loss, times the squared logarithm of the normaliser
    teacher: Teacher | None = None  # a part of the loss is the distance from it
    top_k: int = 0  # return fp64 [rows x seq_len, 1 + 2 k]: that of the label, the most probable tokens, and theirs


@dataclass(frozen=True)
class Loss:
    """Of the rows of one micro-batch."""

    sum: Tensor  # fp32 scalar, with a gradient
    scalars: tuple[Tensor, ...] = ()  # sums of further numbers, one for each of `Objective.scalars`, without

    def sums(self) -> Tensor:
        """fp64 `[1 + scalars]`, without a gradient."""
        return torch.stack([value.detach().double() for value in (self.sum, *self.scalars)])


class Objective(Protocol):
    """What is minimised, as a function of what the head returns.

    A class may say `scalars = ()`, `per_token = False` and so on where the value is always the same.
    """

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names, in metrics.jsonl, of further numbers that `loss` returns."""
        ...

    @property
    def per_token(self) -> bool:
        """Whether `loss` is given the log-probability of each label, in the place of the sum of the losses."""
        ...

    @property
    def reference(self) -> bool:
        """Whether `loss` needs `Batch.reference`: those of the model without its adapter."""
        ...

    @property
    def documents_together(self) -> int:
        """How many documents in turn belong together, and are in one row: 2 for pairs."""
        ...

    def nominal(self, rows: int, seq_len: int) -> int:
        """What `count` of so many rows is, about: losses are divided by it before the backward pass."""
        ...

    def count(self, batch: Batch) -> Tensor:
        """What the sums over these rows are divided by: a scalar on the rows' device."""
        ...

    def loss(self, given: Tensor, batch: Batch) -> Loss:
        """The loss of `batch`, one micro-batch on the device, of which the head has `given` the result.

        `given` is the summed loss (fp32 scalar), or with `per_token` fp32 `[rows, seq_len]`.
        """
        ...


@runtime_checkable
class Taught(Protocol):
    """An objective that makes use of `Batch.teacher_tokens`: see `Teacher`."""

    temperature: float
    mix: float


@runtime_checkable
class WithBaseline(Protocol):
    """An objective whose loss depends on a number of the whole step: `Batch.baseline`.

    It is found by a forward pass of its own, without gradients and without dropout, over all rows of the step.
    """

    def baseline_sums(self, given: Tensor, batch: Batch) -> Tensor:
        """What the number is made of, summed over these rows on the device: fp64 `[n]`. `given` is as in `loss`."""
        ...

    def baseline(self, sums: Tensor) -> Tensor:
        """The number, an fp64 scalar, from the sums over all rows of all ranks."""
        ...


class NextToken:
    """The cross entropy of each label, times its weight; in training with `z_loss` times a square that keeps logits
    small (`Targets`)."""

    scalars: tuple[str, ...] = ()
    per_token = False
    reference = False
    documents_together = 1

    def __init__(self, z_loss: float = 0.0) -> None:
        self.z_loss = z_loss

    def nominal(self, rows: int, seq_len: int) -> int:
        return rows * seq_len

    def count(self, batch: Batch) -> Tensor:
        """The number of labels, or the sum of their weights."""
        if batch.weights is None:
            return batch.valid_tokens()
        return batch.weights.double().where(batch.labels != IGNORE_INDEX, 0.0).sum()

    def loss(self, given: Tensor, batch: Batch) -> Loss:
        return Loss(given)


NEXT_TOKEN = NextToken()


def shown(objective: Objective, means: Mapping[str, float]) -> dict[str, float]:
    """Means of the objective's scalars over what it counts, as metrics. An objective may define `shown(means)`."""
    change: Callable[[Mapping[str, float]], dict[str, float]] = getattr(objective, "shown", dict)
    return change(means)


def targets_of(
    objective: Objective,
    labels: Tensor,
    weights: Tensor | None = None,
    teacher_tokens: Tensor | None = None,
    teacher_log_probabilities: Tensor | None = None,
) -> Tensor | Targets:
    """What the model is given as `labels`: the fields of a batch that concern its head."""
    z_loss, top_k = getattr(objective, "z_loss", 0.0), getattr(objective, "top_k", 0)
    teacher = None
    if teacher_tokens is not None and isinstance(objective, Taught):
        assert teacher_log_probabilities is not None
        teacher = Teacher(teacher_tokens, teacher_log_probabilities, objective.temperature, objective.mix)
    if weights is None and not objective.per_token and not z_loss and not top_k and teacher is None:
        return labels
    return Targets(labels, weights, objective.per_token, z_loss, teacher, top_k)


def shaped(objective: Objective, given: Tensor, labels: Tensor) -> Tensor:
    """What the head of a whole micro-batch returned, as `Objective.loss` is given it."""
    if getattr(objective, "top_k", 0):
        return given.view(*labels.shape, -1)
    return given.view(labels.shape) if objective.per_token else given


def takes_targets(model: Any) -> bool:
    """Whether the head of `model` can be given `Targets`: it declares it, by `takes_targets`."""
    return any(getattr(module, "takes_targets", False) for module in model.modules())
