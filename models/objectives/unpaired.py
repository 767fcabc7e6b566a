"""Learning from answers that are rated one by one: each is desirable or undesirable.

A rated answer is two documents of one row: prompt and answer, and the same prompt with the answer to another one,
which is mismatched. In the place of weights, labels have the rating of their document. The objective is a mean over
the rated answers of a formula of their log-probabilities, sums over the labels, and of those of the reference.

How far the model has moved from the reference is estimated from the mismatched answers of the whole step: it is the
zero of the value of an answer, from which gains and losses count (Ethayarajh et al. 2024, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stoker.conf.schema import ObjectiveConfig
from stoker.models.objectives.answers import by_document
from stoker.parallel.batch import DESIRABLE, IGNORE_INDEX, MISMATCHED, UNDESIRABLE, Batch
from stoker.parallel.objective import Loss

_SHARE = "desirable"


@dataclass(frozen=True)
class _Documents:
    """Of all places for documents, `[rows x places]`."""

    desirable: Tensor  # bool
    undesirable: Tensor  # bool
    mismatched: Tensor  # bool

    @classmethod
    def of(cls, batch: Batch) -> _Documents:
        ratings = batch.weights
        if ratings is None:  # in a rehearsal, whose rows are of no data
            ratings = torch.ones(batch.labels.shape, device=batch.labels.device)
        labelled = batch.labels != IGNORE_INDEX
        found = []
        for rating in (DESIRABLE, UNDESIRABLE, MISMATCHED):
            found.append(by_document(batch, (labelled & (ratings == rating)).double()) > 0)
        return cls(*found)

    @property
    def rated(self) -> Tensor:
        return self.desirable | self.undesirable


class Unpaired:
    """See `stoker.parallel.objective.Objective`. The zero of the value is the reference itself: APO-zero of single
    answers (D'Oosterlinck et al. 2024, as TRL's `apo_zero_unpaired`)."""

    per_token = True
    documents_together = 2
    rated = True
    reference = True
    scalars: tuple[str, ...] = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", _SHARE)

    def __init__(self, config: ObjectiveConfig) -> None:
        self._beta = config.beta
        self._desirable_weight, self._undesirable_weight = config.desirable_weight, config.undesirable_weight

    def nominal(self, rows: int, seq_len: int) -> int:
        """An answer in each row."""
        return rows

    def count(self, batch: Batch) -> Tensor:
        """The number of rated answers."""
        return _Documents.of(batch).rated.sum()

    def loss(self, given: Tensor, batch: Batch) -> Loss:
        documents = _Documents.of(batch)
        log_probability, ratio = _sums(given, batch)
        zero = self._zero(batch)
        gains = torch.sigmoid(-self._beta * (ratio - zero)) * self._desirable_weight  # 1 - s(x) = s(-x)
        losses = torch.sigmoid(-self._beta * (zero - ratio)) * self._undesirable_weight
        total = gains.where(documents.desirable, 0.0).sum() + losses.where(documents.undesirable, 0.0).sum()

        sides, rewards = (documents.desirable, documents.undesirable), self._beta * ratio.detach()
        shown = [values.where(side, 0.0).sum() for values in (rewards, log_probability.detach()) for side in sides]
        return Loss(total.float(), (*shown, documents.desirable.double().sum(), *self._further(batch, documents)))

    def shown(self, means: Mapping[str, float]) -> dict[str, float]:
        """Means over the desirable answers, and over the undesirable ones; without those of which there are none."""
        found = dict(means)
        share = found[_SHARE]
        for side, part in (("chosen", share), ("rejected", 1 - share)):
            for name in (f"rewards/{side}", f"logps/{side}"):
                value = found.pop(name)
                if part:
                    found[name] = value / part
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def _zero(self, batch: Batch) -> Tensor:
        """The zero of the value: fp64 scalar."""
        return torch.zeros((), dtype=torch.float64, device=batch.labels.device)

    def _further(self, batch: Batch, documents: _Documents) -> tuple[Tensor, ...]:
        """Sums of further scalars."""
        return ()


class KTO(Unpaired):
    """Ethayarajh et al. 2024, equations 7 and 8. Also a `stoker.parallel.objective.WithBaseline`."""

    scalars = (*Unpaired.scalars, "kl")

    def baseline_sums(self, given: Tensor, batch: Batch) -> Tensor:
        """The sum over the mismatched answers of their log-ratios, and how many there are."""
        mismatched = _Documents.of(batch).mismatched
        _, ratio = _sums(given, batch)
        return torch.stack([ratio.where(mismatched, 0.0).sum(), mismatched.double().sum()])

    def baseline(self, sums: Tensor) -> Tensor:
        """The mean, or 0 where that is below: an estimate of the KL divergence, which never is."""
        return (sums[0] / sums[1].clamp(min=1.0)).clamp(min=0.0)

    def _zero(self, batch: Batch) -> Tensor:
        assert batch.baseline is not None
        return batch.baseline[0]

    def _further(self, batch: Batch, documents: _Documents) -> tuple[Tensor, ...]:
        return (documents.rated.double().sum() * self._zero(batch),)


def _sums(given: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each document its log-probability, and that less the reference's: fp64 `[rows x places]`."""
    assert batch.reference is not None
    log_probability = by_document(batch, given.double())
    return log_probability, log_probability - by_document(batch, batch.reference.double())


UNPAIRED = {"kto": KTO, "apo_zero_unpaired": Unpaired}
