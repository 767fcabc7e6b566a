"""Preference objectives as functions of log-probabilities: the published formulas, and sums over rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stoker.conf.schema import ObjectiveConfig
from stoker.conf.units import loss_unit
from stoker.models.objectives import USES, objective_of
from stoker.parallel.batch import IGNORE_INDEX, Batch
from stoker.parallel.layout import Layout
from stoker.parallel.objective import NEXT_TOKEN, Objective, WithBaseline, shown
from tests.parallel.parity import Case
from tests.parallel.preferences import (
    FORMULAS,
    OBJECTIVES,
    RATED,
    config_of,
    desirable_of,
    pairs,
    rated_of,
    scalars_of,
)

NAMES = sorted(FORMULAS)


def rows_and_scores(name: str) -> tuple[Batch, Tensor]:
    """Rows of pairs with a reference, and log-probabilities with a gradient."""
    rows = pairs(config_of(name, Layout(), Case(1)), 1)
    generator = torch.Generator().manual_seed(1)
    labelled = (rows.labels != IGNORE_INDEX).float()
    ours, theirs = (-labelled * torch.rand(rows.labels.shape, generator=generator) * 3 for _ in range(2))
    return replace(rows, reference=theirs), ours.requires_grad_()


def sides(values: Tensor, rows: Batch) -> list[tuple[Tensor, Tensor]]:
    found = []
    for row in range(len(rows)):
        for chosen in range(0, int(rows.documents[row].max()), 2):
            both = [
                values[row, (rows.documents[row] == number) & (rows.labels[row] != IGNORE_INDEX)]
                for number in (chosen, chosen + 1)
            ]
            if all(len(side) for side in both):
                found.append((both[0], both[1]))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_losses_rewards_and_gradients_are_the_formulas(name: str) -> None:
    config, (rows, ours) = OBJECTIVES[name], rows_and_scores(name)
    assert rows.reference is not None
    theirs, exact = sides(rows.reference.double(), rows), ours.detach().double().requires_grad_()
    found = [FORMULAS[name](config, o, t) for o, t in zip(sides(exact, rows), theirs, strict=True)]
    expected = torch.stack([loss for loss, _ in found]).sum()
    (wanted,) = torch.autograd.grad(expected, exact)

    objective = objective_of(config)
    loss = objective.loss(ours, rows)
    (gradient,) = torch.autograd.grad(loss.sum, ours)
    assert int(objective.count(rows)) == len(found)
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-6)
    labelled = rows.labels != IGNORE_INDEX  # the head has no gradient at the other places
    assert (gradient - wanted)[labelled].norm() < 1e-6 * wanted.norm()
    means = {scalar: float(s) / len(found) for scalar, s in zip(objective.scalars, loss.scalars, strict=True)}
    rewards = tuple([side.detach() for side in each] for _, each in found)
    assert means == pytest.approx(scalars_of(rewards, sides(ours.detach().double(), rows)), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_sums_over_micro_batches_are_the_sum_over_the_batch(name: str) -> None:
    objective, (rows, ours) = objective_of(OBJECTIVES[name]), rows_and_scores(name)
    whole = objective.loss(ours.detach(), rows).sums()
    parts = [objective.loss(ours.detach()[n : n + 3], rows[n : n + 3]).sums() for n in range(0, len(rows), 3)]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-6, atol=0)
    assert sum(objective.count(rows[n : n + 3]) for n in range(0, len(rows), 3)) == objective.count(rows)


@pytest.mark.parametrize("name", NAMES)
def test_rows_may_have_an_odd_length(name: str) -> None:
    objective, (rows, ours) = objective_of(OBJECTIVES[name]), rows_and_scores(name)
    cut = {field: value[:, :15] for field, value in vars(rows).items() if value is not None}  # a place of padding less
    expected = objective.loss(ours.detach(), rows).sums()
    assert torch.equal(objective.loss(ours.detach()[:, :15], Batch(**cut)).sums(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_with_an_answer_without_labels_counts_nothing(name: str) -> None:
    objective, (rows, ours) = objective_of(OBJECTIVES[name]), rows_and_scores(name)
    first = rows[:1]
    half = replace(first, labels=first.labels.masked_fill(first.documents == 1, IGNORE_INDEX))
    loss = objective.loss(ours[:1], half)
    (gradient,) = torch.autograd.grad(loss.sum, ours)
    assert int(objective.count(first)) == 1 and int(objective.count(half)) == 0
    assert loss.sums().tolist() == [0.0] * 7 and not gradient.any()


def rated_rows(name: str) -> tuple[Objective, Batch, Tensor]:
    """An objective, rows with its baseline, and log-probabilities with a gradient."""
    objective, (rows, ours) = objective_of(OBJECTIVES[name]), rows_and_scores(name)
    if isinstance(objective, WithBaseline):
        halves = [objective.baseline_sums(ours.detach()[part], rows[part]) for part in (slice(7), slice(7, None))]
        rows = replace(rows, baseline=objective.baseline(halves[0] + halves[1]).expand(len(rows)))
    return objective, rows, ours


@pytest.mark.parametrize("sign", [1, -1], ids=["above the reference", "below it"])
@pytest.mark.parametrize("name", RATED)
def test_losses_rewards_and_gradients_of_rated_answers_are_the_formulas(name: str, sign: int) -> None:
    objective, rows, ours = rated_rows(name)
    assert rows.reference is not None
    if sign < 0:  # the estimate of the divergence is 0 on one side
        ours, rows = rows.reference.clone().requires_grad_(), replace(rows, reference=ours.detach(), baseline=None)
        if isinstance(objective, WithBaseline):
            baseline = objective.baseline(objective.baseline_sums(ours.detach(), rows))
            rows = replace(rows, baseline=baseline.expand(len(rows)))
    assert rows.reference is not None
    theirs, exact = sides(rows.reference.double(), rows), ours.detach().double().requires_grad_()
    expected, count, scalars = rated_of(OBJECTIVES[name], sides(exact, rows), theirs, desirable_of(rows))
    (wanted,) = torch.autograd.grad(expected * count, exact)

    loss = objective.loss(ours, rows)
    (gradient,) = torch.autograd.grad(loss.sum, ours)
    assert int(objective.count(rows)) == count
    assert loss.sum.item() == pytest.approx(expected.item() * count, rel=1e-6)
    labelled = rows.labels != IGNORE_INDEX
    assert (gradient - wanted)[labelled].norm() < 1e-6 * wanted.norm()
    assert not gradient[labelled & (rows.documents % 2 == 1)].any()  # of mismatched answers
    means = {scalar: float(s) / count for scalar, s in zip(objective.scalars, loss.scalars, strict=True)}
    assert shown(objective, means) == pytest.approx(scalars, rel=1e-6)


def test_one_side_of_the_reference_has_a_divergence() -> None:
    found = [float(rated_rows("kto")[1].baseline[0])]  # type: ignore[index]
    objective, (rows, ours) = objective_of(OBJECTIVES["kto"]), rows_and_scores("kto")
    assert isinstance(objective, WithBaseline) and rows.reference is not None
    swapped = replace(rows, reference=ours.detach())
    found.append(float(objective.baseline(objective.baseline_sums(rows.reference, swapped))))
    assert min(found) == 0 < max(found)


@pytest.mark.parametrize("name", RATED)
def test_sums_over_rated_micro_batches_are_the_sum_over_the_batch(name: str) -> None:
    objective, rows, ours = rated_rows(name)
    whole = objective.loss(ours.detach(), rows).sums()
    parts = [objective.loss(ours.detach()[n : n + 3], rows[n : n + 3]).sums() for n in range(0, len(rows), 3)]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-6, atol=0)


def test_metrics_of_a_side_without_answers_are_left_out() -> None:
    objective, rows, ours = rated_rows("kto")
    assert rows.weights is not None
    rows = replace(rows, weights=rows.weights.abs())
    loss, count = objective.loss(ours, rows), float(objective.count(rows))
    means = {scalar: float(s) / count for scalar, s in zip(objective.scalars, loss.scalars, strict=True)}
    assert set(shown(objective, means)) == {"rewards/chosen", "logps/chosen", "desirable", "kl"}


def test_an_objective_is_found_by_its_name_or_by_its_path() -> None:
    assert objective_of(ObjectiveConfig()) is NEXT_TOKEN
    assert set(USES) == {"next_token", "distill", *FORMULAS, *RATED}
    own = ObjectiveConfig(target="tests.models.test_objectives:mine", args={"a": 1})
    assert objective_of(own) == {"a": 1}  # type: ignore[comparison-overlap]
    configs = (ObjectiveConfig(), ObjectiveConfig("dpo"), ObjectiveConfig("kto"), own)
    units = [loss_unit(config) for config in configs]
    assert units[:3] == ["nats per token", "dpo, per pair", "kto, per answer"]
    assert units[3] == "as tests.models.test_objectives:mine counts"


def mine(config: ObjectiveConfig) -> object:
    return config.args
