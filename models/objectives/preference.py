"""Learning from preferences: of two answers to a prompt, one is chosen and one is rejected.

A pair is two documents of one row, prompt and answer each, in this order: documents 2k and 2k + 1 of a row. The
objective is a mean over pairs of a formula of the answers' log-probabilities, which are sums over their labels. Those
of the reference are the same with the adapter off, or were stored by `stoker teach`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stoker.conf.schema import ObjectiveConfig
from stoker.models.objectives.answers import by_document
from stoker.parallel.batch import IGNORE_INDEX, Batch
from stoker.parallel.objective import Loss

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True)
class Answers:
    """Numbers of pairs of answers, all `[pairs, 2]`: of the chosen one and of the rejected one."""

    log_probability: Tensor  # fp64, with a gradient
    reference: Tensor  # fp64, under the reference; zeros where the formula uses none
    tokens: Tensor  # fp64, how many labels each has

    @property
    def mean(self) -> Tensor:
        """Log-probability per label."""
        return self.log_probability / self.tokens


@dataclass(frozen=True)
class Formula:
    """The loss of each pair, fp64 `[pairs]`, and the rewards of its answers, `[pairs, 2]`."""

    compute: Callable[[Answers, ObjectiveConfig], tuple[Tensor, Tensor]]
    uses: tuple[str, ...]  # keys of the config
    reference: bool = False


class Preference:
    """See `stoker.parallel.objective.Objective`. Pairs without a label in both answers count nothing."""

    per_token = True
    documents_together = 2
    scalars = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )

    def __init__(self, formula: Formula, config: ObjectiveConfig) -> None:
        self._formula, self._config = formula, config
        self.reference = formula.reference

    def nominal(self, rows: int, seq_len: int) -> int:
        """A pair in each row."""
        return rows

    def count(self, batch: Batch) -> Tensor:
        """The number of pairs."""
        return _complete(_by_answer(batch, (batch.labels != IGNORE_INDEX).double())).sum()

    def loss(self, given: Tensor, batch: Batch) -> Loss:
        tokens = _by_answer(batch, (batch.labels != IGNORE_INDEX).double())
        complete = _complete(tokens)
        # What is in the place of a pair that is none is finite in every formula, and has no gradient.
        log_probability = torch.where(complete[:, None], _by_answer(batch, given.double()), -1.0)
        reference = torch.zeros_like(log_probability)
        if self._formula.reference:
            assert batch.reference is not None
            reference = _by_answer(batch, batch.reference.double())
        answers = Answers(log_probability, reference, tokens.clamp(min=1.0))
        losses, rewards = self._formula.compute(answers, self._config)

        margins = rewards[:, CHOSEN] - rewards[:, REJECTED]
        shown = [*rewards.T, margins, (margins > 0).double(), *log_probability.T]
        sums = (values.detach().where(complete, 0.0).sum() for values in shown)
        return Loss(losses.where(complete, 0.0).sum().float(), tuple(sums))


def _by_answer(batch: Batch, values: Tensor) -> Tensor:
    """The sums of `values` (fp64 `[rows, seq_len]`, of labels) over the labels of each answer: `[pairs, 2]`."""
    return by_document(batch, values).view(-1, 2)


def _complete(tokens: Tensor) -> Tensor:
    """Which pairs have labels in both answers: bool `[pairs]`."""
    return (tokens > 0).all(-1)


def _dpo(answers: Answers, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Rafailov et al. 2023, equation 7; with label smoothing Mitchell 2023 (conservative DPO)."""
    rewards = config.beta * (answers.log_probability - answers.reference)
    margin, smoothing = rewards[:, CHOSEN] - rewards[:, REJECTED], config.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin), rewards


def _ipo(answers: Answers, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Azar et al. 2023, equation 17, with log-probabilities per label: else long answers would outweigh short ones."""
    gains = answers.mean - answers.reference / answers.tokens
    loss = (gains[:, CHOSEN] - gains[:, REJECTED] - 1 / (2 * config.beta)).square()
    return loss, config.beta * gains


def _simpo(answers: Answers, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Meng et al. 2024, equation 6."""
    rewards = config.beta * answers.mean
    return -F.logsigmoid(rewards[:, CHOSEN] - rewards[:, REJECTED] - config.gamma), rewards


def _orpo(answers: Answers, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Hong et al. 2024, equations 6 and 7; beta is their lambda."""
    mean = answers.mean
    log_odds = mean - torch.log(-torch.expm1(mean))
    ratio = F.logsigmoid(log_odds[:, CHOSEN] - log_odds[:, REJECTED])
    return -mean[:, CHOSEN] - config.beta * ratio, config.beta * mean


FORMULAS = {
    "dpo": Formula(_dpo, ("beta", "label_smoothing", "teacher"), reference=True),
    "ipo": Formula(_ipo, ("beta", "teacher"), reference=True),
    "simpo": Formula(_simpo, ("beta", "gamma")),
    "orpo": Formula(_orpo, ("beta",)),
}
