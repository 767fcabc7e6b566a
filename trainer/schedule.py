"""Learning rate schedules, and how often a run evaluates: pure functions of the step and the config."""

from __future__ import annotations

import math

from stoker.conf.schema import Config, OptimConfig, ScheduleConfig

_LEAST_EVERY = 50  # steps between evaluations where the config does not say: fewer would cost a share of the training


def learning_rate(schedule: ScheduleConfig, optim: OptimConfig, step: int) -> float:
    """The learning rate of step `step` (from 1). Past `total_steps` it stays where the schedule ended.

    constant: the peak after warmup. cosine: half a cosine from the peak to `final` x peak (Loshchilov & Hutter 2017,
    without restarts). wsd: the peak until the last `decay_fraction` of the steps, then linear to `final` x peak
    (warmup-stable-decay, Hu et al. 2024).
    """
    total = schedule.total_steps
    assert total is not None, "pinned at the first start"
    if step <= schedule.warmup_steps:
        return optim.lr * step / schedule.warmup_steps
    if schedule.name == "constant":
        return optim.lr
    if schedule.name == "cosine":
        start, shape = schedule.warmup_steps, lambda done: 0.5 * (1 + math.cos(math.pi * done))
    elif schedule.name == "wsd":
        start, shape = max(schedule.warmup_steps, round(total * (1 - schedule.decay_fraction))), lambda done: 1 - done
    else:
        raise ValueError(f"unknown schedule {schedule.name!r}: constant, cosine or wsd")
    done = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    return optim.lr * (schedule.final + (1 - schedule.final) * shape(done))


def evaluation_every(config: Config) -> int:
    """Steps between evaluations; 0 for one at the end only."""
    return max(config.steps // 10, _LEAST_EVERY) if config.eval.every is None else config.eval.every
