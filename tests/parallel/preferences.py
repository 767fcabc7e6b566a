"""Pairs of answers, and what objectives are compared with: two whole models in float64, no line of an engine's code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stoker.conf.schema import AdapterConfig, Config, ObjectiveConfig, OptimConfig
from stoker.models.adapters import apply, plan_of
from stoker.models.decoder import Decoder
from stoker.parallel.batch import DESIRABLE, IGNORE_INDEX, MISMATCHED, UNDESIRABLE, Batch
from stoker.parallel.layout import Layout
from stoker.parallel.model import whole_model
from tests.parallel.parity import Case
from tests.parallel.reference import VOCABULARY, initial_value

STEPS = 10
Sides = tuple[Tensor, Tensor]  # log-probabilities of the labels of a pair's two documents
# The first is the weighted mean of all labels' losses, with an adapter too.
OBJECTIVES = {
    "weights": ObjectiveConfig(),
    "dpo": ObjectiveConfig("dpo", beta=0.7, label_smoothing=0.1),
    "ipo": ObjectiveConfig("ipo", beta=0.3),
    "simpo": ObjectiveConfig("simpo", beta=2.0, gamma=0.5),
    "orpo": ObjectiveConfig("orpo", beta=0.4),
    "kto": ObjectiveConfig("kto", beta=0.7, desirable_weight=1.5, undesirable_weight=0.5),
    "apo_zero_unpaired": ObjectiveConfig("apo_zero_unpaired", beta=0.5, undesirable_weight=1.2),
    "distill": ObjectiveConfig("distill", teacher="in the batch", temperature=2.0, mix=0.7),
}
RATED = ("kto", "apo_zero_unpaired")
TAUGHT = 5  # tokens for each label


def config_of(name: str, layout: Layout, case: Case) -> Config:
    """Under SGD: AdamW divides a gradient that is only rounding by itself."""
    config = case.config(layout)
    config.seq_len = 16
    config.optim = OptimConfig(name="sgd", lr=0.05, momentum=0.9, weight_decay=0.0)
    config.model.initializer_range = 0.1  # RMSNorm magnifies the rounding of activations that are tiny
    config.objective = OBJECTIVES[name]
    config.adapter = AdapterConfig("lora", rank=4)
    return config


def pairs(config: Config, step: int) -> Batch:
    """The rows of a global batch: one or two pairs of unequal answers, and padding. Every fourth row has no label.

    Of rated answers the second of a pair is the mismatched one.
    """
    count, length = config.batch.size, config.seq_len
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (count, length), generator=generator)
    labels = torch.full((count, length), IGNORE_INDEX)
    documents, positions = torch.zeros(count, length, dtype=torch.int32), torch.zeros(count, length, dtype=torch.int64)
    for row in range(count):
        sizes = [5, 4, 3, 3] if row % 2 else [6, 8]
        at = 0
        for number, size in enumerate([*sizes, length - sum(sizes)]):
            documents[row, at : at + size], positions[row, at : at + size] = number, torch.arange(size)
            prompt = int(torch.randint(1, size, (1,), generator=generator)) if size > 1 else 1
            if number < len(sizes) and row % 4 != 3:
                labels[row, at + prompt - 1 : at + size - 1] = tokens[row, at + prompt : at + size]
            at += size
    weights = None
    if config.objective.name == "next_token":
        weights = torch.randint(1, 4, (count, length), generator=generator) / 4
    if config.objective.name in RATED:
        desirable = torch.rand(count, 1, generator=generator) < 0.5
        weights = torch.where(desirable, DESIRABLE, UNDESIRABLE).expand(count, length).clone()
        weights[documents % 2 == 1] = MISMATCHED
    rows = Batch(tokens, labels, positions, documents, weights)
    if config.objective.name != "distill":
        return rows
    taught = torch.randn(count, length, VOCABULARY, generator=generator).log_softmax(-1).topk(TAUGHT)
    return replace(rows, teacher_tokens=taught.indices.int(), teacher_log_probabilities=taught.values)


@dataclass
class Expected:
    """What a run computes."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    scalars: list[dict[str, float]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the last step's sum over pairs
    trained: dict[str, Tensor] = field(default_factory=dict)


def in_plain_torch(config: Config, steps: int = STEPS) -> Expected:
    """Train with SGD, the reference being a second model that has no adapter."""
    policy, reference = model_of(config, adapted=True), model_of(config, adapted=False)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=config.optim.lr, momentum=config.optim.momentum)
    found = Expected()
    for step in range(1, steps + 1):
        rows = pairs(config, step)
        if rows.teacher_tokens is not None:
            loss, count, scalars = distillation(config.objective, policy, rows)
        elif config.objective.name in RATED:
            loss, count, scalars = rated(config.objective, policy, reference, rows)
        elif rows.weights is None:
            loss, count, scalars = preference(config.objective, policy, reference, rows)
        else:
            loss, count, scalars = weighted_mean(policy, rows, rows.weights)
        optimizer.zero_grad()
        loss.backward()
        found.gradients = {name: count * p.grad for name, p in trained.items() if p.grad is not None}
        found.norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), config.grad_clip_norm or 1e9)))
        optimizer.step()
        found.losses.append(loss.item())
        found.scalars.append(scalars)
    found.trained = {name: parameter.detach() for name, parameter in trained.items()}
    return found


def weighted_mean(policy: nn.Module, rows: Batch, weights: Tensor) -> tuple[Tensor, float, dict[str, float]]:
    logits = policy(rows.tokens, rows.positions, rows.documents)
    losses = F.cross_entropy(logits, rows.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    count = weights[rows.labels != IGNORE_INDEX].sum()
    return (weights.flatten() * losses).sum() / count, float(count), {}


def distillation(config: ObjectiveConfig, policy: nn.Module, rows: Batch) -> tuple[Tensor, float, dict[str, float]]:
    """By torch's own divergence, over the whole vocabulary: tokens that the teacher does not name have no share."""
    assert rows.teacher_tokens is not None and rows.teacher_log_probabilities is not None
    labelled = rows.labels.flatten() != IGNORE_INDEX
    logits = policy(rows.tokens, rows.positions, rows.documents)[labelled].double()
    shares = torch.zeros_like(logits)
    softened = (rows.teacher_log_probabilities.flatten(0, 1)[labelled].double() / config.temperature).softmax(-1)
    shares.scatter_(-1, rows.teacher_tokens.flatten(0, 1)[labelled].long(), softened)
    distance = F.kl_div((logits / config.temperature).log_softmax(-1), shares, reduction="sum")
    entropy = F.cross_entropy(logits, rows.labels.flatten()[labelled], reduction="sum")
    count = int(labelled.sum())
    return (config.mix * config.temperature**2 * distance + (1 - config.mix) * entropy) / count, count, {}


def preference(
    config: ObjectiveConfig, policy: nn.Module, reference: nn.Module, rows: Batch
) -> tuple[Tensor, float, dict[str, float]]:
    with torch.no_grad():
        theirs = answers(reference, rows)
    ours, formula = answers(policy, rows), FORMULAS[config.name]
    losses, rewards = zip(*(formula(config, o, r) for o, r in zip(ours, theirs, strict=True)), strict=True)
    return torch.stack(losses).mean(), len(losses), scalars_of(rewards, ours)


def rated(
    config: ObjectiveConfig, policy: nn.Module, reference: nn.Module, rows: Batch
) -> tuple[Tensor, float, dict[str, float]]:
    """KTO over single answers; without its reference point APO-zero."""
    with torch.no_grad():
        theirs = answers(reference, rows)
    ours = answers(policy, rows)
    return rated_of(config, ours, theirs, desirable_of(rows))


def desirable_of(rows: Batch) -> list[bool]:
    """Of each pair that has labels whether its answer is desirable."""
    assert rows.weights is not None
    found = []
    for row in range(len(rows)):
        labelled = rows.labels[row] != IGNORE_INDEX
        for number in range(0, int(rows.documents[row].max()), 2):
            own = rows.weights[row, (rows.documents[row] == number) & labelled].tolist()
            found += [own[0] > 0] if own else []
    return found


def rated_of(
    config: ObjectiveConfig, ours: list[Sides], theirs: list[Sides], desirable: list[bool]
) -> tuple[Tensor, float, dict[str, float]]:
    """The mean loss, how many answers there are, and the scalars."""
    moved = torch.stack([o.sum() - t.sum() for (_, o), (_, t) in zip(ours, theirs, strict=True)]).mean().detach()
    zero = moved.clamp(min=0) if config.name == "kto" else torch.zeros(())
    losses, rewards, logs = [], {True: [], False: []}, {True: [], False: []}  # type: ignore[var-annotated]
    for (own, _), (other, _), good in zip(ours, theirs, desirable, strict=True):
        ratio = own.sum() - other.sum()
        value = torch.sigmoid(config.beta * (ratio - zero if good else zero - ratio))
        losses.append((config.desirable_weight if good else config.undesirable_weight) * (1 - value))
        rewards[good].append(config.beta * ratio.detach())
        logs[good].append(own.sum().detach())
    chosen, rejected = (float(torch.stack(rewards[good]).mean()) for good in (True, False))
    scalars = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "logps/chosen": float(torch.stack(logs[True]).mean()),
        "logps/rejected": float(torch.stack(logs[False]).mean()),
        "desirable": sum(desirable) / len(desirable),
    }
    scalars |= {"kl": float(zero)} if config.name == "kto" else {}
    return torch.stack(losses).mean(), len(losses), scalars


def model_of(config: Config, adapted: bool) -> nn.Module:
    model: nn.Module = Decoder(config.model, whole_model(config.model.num_hidden_layers))
    if adapted:
        model = apply(model, plan_of(model, config), config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.A"):
            std, shape = (3 * parameter.shape[1]) ** -0.5, tuple(parameter.shape)
            parameter.data.copy_(initial_value(config, name, shape) / config.model.initializer_range * std)
        elif name.endswith("lora.B"):
            parameter.data.zero_()
        else:
            parameter.data.copy_(initial_value(config, name, tuple(parameter.shape)))
    return model.double()


def answers(model: nn.Module, rows: Batch) -> list[tuple[Tensor, Tensor]]:
    """The log-probabilities of the labels of each pair: of the chosen answer and of the rejected one."""
    logits = model(rows.tokens, rows.positions, rows.documents).view(*rows.tokens.shape, -1)
    each = logits.log_softmax(-1).gather(-1, rows.labels.clamp(min=0)[..., None])[..., 0]
    found = []
    for row in range(len(rows)):
        for chosen in range(0, int(rows.documents[row].max()), 2):
            sides = [
                each[row, (rows.documents[row] == number) & (rows.labels[row] != IGNORE_INDEX)]
                for number in (chosen, chosen + 1)
            ]
            if all(len(side) for side in sides):
                found.append((sides[0], sides[1]))
    return found


def _dpo(config: ObjectiveConfig, ours: Sides, theirs: Sides) -> tuple[Tensor, list[Tensor]]:
    chosen, rejected = (config.beta * (o.sum() - t.sum()) for o, t in zip(ours, theirs, strict=True))
    probability = torch.sigmoid(chosen - rejected)
    e = config.label_smoothing
    return -(1 - e) * probability.log() - e * (1 - probability).log(), [chosen, rejected]


def _ipo(config: ObjectiveConfig, ours: Sides, theirs: Sides) -> tuple[Tensor, list[Tensor]]:
    chosen, rejected = (o.mean() - t.mean() for o, t in zip(ours, theirs, strict=True))
    return (chosen - rejected - 0.5 / config.beta) ** 2, [config.beta * chosen, config.beta * rejected]


def _simpo(config: ObjectiveConfig, ours: Sides, theirs: Sides) -> tuple[Tensor, list[Tensor]]:
    chosen, rejected = (config.beta * o.mean() for o in ours)
    return -torch.sigmoid(chosen - rejected - config.gamma).log(), [chosen, rejected]


def _orpo(config: ObjectiveConfig, ours: Sides, theirs: Sides) -> tuple[Tensor, list[Tensor]]:
    chosen, rejected = (o.mean().exp() for o in ours)
    ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    loss = -ours[0].mean() - config.beta * torch.sigmoid(ratio.log()).log()
    return loss, [config.beta * o.mean() for o in ours]


FORMULAS: dict[str, Callable[[ObjectiveConfig, Sides, Sides], tuple[Tensor, list[Tensor]]]] = {
    "dpo": _dpo,
    "ipo": _ipo,
    "simpo": _simpo,
    "orpo": _orpo,
}


def scalars_of(rewards: tuple[list[Tensor], ...], ours: list[Sides]) -> dict[str, float]:
    chosen, rejected = (torch.stack(side).detach() for side in zip(*rewards, strict=True))
    sums = [torch.stack([side.sum() for side in sides]).detach() for sides in zip(*ours, strict=True)]
    return {
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/margins": float((chosen - rejected).mean()),
        "rewards/accuracies": float((chosen > rejected).float().mean()),
        "logps/chosen": float(sums[0].mean()),
        "logps/rejected": float(sums[1].mean()),
    }
