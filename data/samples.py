"""The sequences that an evaluation reads: a fixed sample of the validation data, and one of the training data.

A sample is a function of the data and `eval.seed`. The sequences of a source, in the order of its documents, are cut
into as many stretches of equal length as there are sequences to take, and one is drawn from each: the sample is spread
over all documents, so its mean is closer to that of all sequences than the mean of as many drawn from anywhere.
Sources have the shares that they have in the first training step, in both samples, so both losses can be compared with
each other and with the loss of training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stoker.conf.schema import Config
from stoker.data.indexed import IndexPlan
from stoker.data.opening import no_sequence, open_plans, open_rows
from stoker.data.shuffle import permute
from stoker.data.sources import specs_of, wanted_weights

log = logging.getLogger(__name__)

SEQUENCES = 64  # of each sample, where eval.sequences does not say how many


@dataclass(frozen=True)
class Sample:
    """Sequences of one source to evaluate: `numbers` of `plan`."""

    source: str
    split: str  # validation | train
    plan: IndexPlan
    numbers: np.ndarray  # int64


def prepare(config: Config) -> None:
    """Tokenise the data of `config` if that has not been done, and prove that they make rows and samples.

    Called once per machine before its ranks call `open_rows` and `open_samples`. Raises ValueError for data that cannot
    be used.
    """
    if config.data.mode != "streaming":  # whose texts are tokenised as they are read
        open_rows(config, "train")
    open_samples(config)


def open_samples(config: Config) -> list[Sample]:
    """The samples of every source, those of validation first; none where there is nothing to evaluate.

    Raises ValueError for data that cannot be used, and when `eval.sequences` is given and the validation data make
    fewer.
    """
    wanted = SEQUENCES if config.eval.sequences is None else config.eval.sequences
    if not wanted:
        return []
    streaming = config.data.mode == "streaming"
    specs = specs_of(config.data)
    if config.eval.sequences is None and not any(
        spec.config.validation or spec.config.validation_path for spec in specs
    ):
        return []
    training = [] if streaming else open_plans(config, "train")
    weights: Sequence[float] = (1,)
    if config.data.sources:
        rows = [plan.rows_per_epoch for plan in training] or [1] * len(specs)
        weights = wanted_weights(config.data, specs, rows)[0].weights
    shares = allocate(wanted, weights, [wanted] * len(weights))
    validation = open_plans(config, "validation", shares)
    available = [plan.rows_per_epoch for plan in validation]
    if not sum(available):
        problem = no_sequence(config, validation[0], "validation")
        if config.eval.sequences is not None:
            raise ValueError(problem)
        log.info("no validation loss: %s", problem)
        return []
    if config.eval.sequences is not None and wanted > sum(available):
        documents = sum(len(plan.tokens.starts) for plan in validation)
        raise ValueError(
            f"eval.sequences={wanted}, but the {documents} validation documents make {sum(available)} sequences of "
            f"{config.seq_len} tokens: lower eval.sequences or keep more for validation (data.validation, "
            "data.validation_path)"
        )
    counts = allocate(min(wanted, sum(available)), weights, available)
    if streaming:
        training = open_plans(config, "train", counts)
    both = (("validation", validation, counts), ("train", training, counts))
    return [
        Sample(plan.name, split, plan, spread(min(count, plan.rows_per_epoch), plan.rows_per_epoch, config.eval.seed))
        for split, plans, taken in both
        for plan, count in zip(plans, taken, strict=True)
        if count
    ]


def allocate(total: int, weights: Sequence[float], available: Sequence[int]) -> list[int]:
    """How many of `total` sequences each source gives: by its weight, at least one where it has any, and no more than
    it has. One without a weight gives none."""
    counts = [0] * len(weights)
    able = sorted((n for n, weight in enumerate(weights) if weight and available[n]), key=lambda n: -weights[n])
    for n in able[:total]:
        counts[n] = 1
    whole = sum(weights[n] for n in able)
    for _ in range(total - sum(counts)):
        short = [n for n in able if counts[n] < available[n]]
        if not short:
            break
        counts[max(short, key=lambda n: total * weights[n] / whole - counts[n])] += 1
    return counts


def spread(count: int, size: int, seed: int | None) -> np.ndarray:
    """`count` of the numbers below `size`, rising: one from each of `count` stretches. Without a seed the first."""
    if seed is None:
        return np.arange(count)
    cuts = [n * size // count for n in range(count + 1)]
    drawn = [
        begin + int(permute(np.zeros(1, np.int64), end - begin, seed, n, of="evaluation")[0])
        for n, (begin, end) in enumerate(pairwise(cuts))
    ]
    return np.array(drawn, np.int64)
