"""Learning rate schedules, and how often a run evaluates: pure functions of the step and the config."""

from __future__ import annotations

import math
from collections.abc import Callable

from stoker.conf.schema import Config, OptimConfig, ScheduleConfig

_LEAST_EVERY = 50  # steps between evaluations where the config does not say: fewer would cost a share of the training
# What is left of the way from the peak to the final rate, after a share of the decay.
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "sqrt": lambda done: 1 - math.sqrt(done),  # Hägele et al. 2024
}


def learning_rate(schedule: ScheduleConfig, optim: OptimConfig, step: int) -> float:
    """The learning rate of step `step` (from 1). Past `total_steps` it stays where the schedule ended.

    constant: the peak after warmup. linear: from the peak to `final` x peak. cosine: half a cosine there (Loshchilov &
    Hutter 2017), with `cycle_steps` in cycles that begin at the peak again, each `cycle_growth` times as long as the
    one before. inverse_sqrt: the peak times the root of warmup / step (Vaswani et al. 2017), at least `final` x peak.
    wsd: the peak until the last `decay_fraction` of the steps, then `decay_shape` to `final` x peak
    (warmup-stable-decay, Hu et al. 2024); before that, over each span of `decays`, after which the peak is back.
    """
    total = schedule.total_steps
    assert total is not None, "pinned at the first start"
    warmup = schedule.warmup_steps
    if step <= warmup:
        return optim.lr * step / warmup
    if schedule.name == "constant":
        return optim.lr
    if schedule.name == "inverse_sqrt":
        return optim.lr * max(schedule.final, math.sqrt(max(1, warmup) / min(step, total)))
    if schedule.name in ("cosine", "linear"):
        start, end, shape = warmup, total, _SHAPES[schedule.name]
        if schedule.cycle_steps is not None:
            start, end = _cycle(schedule, min(step, total))
    elif schedule.name == "wsd":
        start, end, shape = (
            max(warmup, round(total * (1 - schedule.decay_fraction))),
            total,
            _SHAPES[schedule.decay_shape],
        )
        span = next((span for span in schedule.decays if span[0] <= step <= span[1]), None)
        if span is not None:
            start, end = span[0] - 1, span[1]
    else:
        raise ValueError(f"unknown schedule {schedule.name!r}")
    done = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    return optim.lr * (schedule.final + (1 - schedule.final) * shape(done))


def _cycle(schedule: ScheduleConfig, step: int) -> tuple[int, int]:
    """The last step before the cycle of `step`, at the peak, and the last one of it."""
    assert schedule.cycle_steps is not None
    start, length = schedule.warmup_steps, float(schedule.cycle_steps)
    while step > start + round(length):
        start, length = start + round(length), length * schedule.cycle_growth
    return start, start + round(length)


def tasks_every(config: Config) -> int:
    """Steps between two times that the tasks of `eval.tasks` are run; 0 for once at the end."""
    return evaluation_every(config) if config.eval.tasks_every is None else config.eval.tasks_every


def evaluation_every(config: Config) -> int:
    """Steps between evaluations; 0 for one at the end only."""
    return max(config.steps // 10, _LEAST_EVERY) if config.eval.every is None else config.eval.every
