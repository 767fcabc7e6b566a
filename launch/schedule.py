"""`stoker config --schedule`: the learning rate of a run, and its batch, drawn over its steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from stoker.conf.ramp import ramp_of
from stoker.conf.schema import Config, ScheduleConfig
from stoker.trainer.schedule import learning_rate

ROWS = 10  # of the drawing
_FEWEST = 20  # columns of the drawing, on a screen of any width


def lines_of(config: Config, width: int) -> Iterator[str]:
    """A drawing of at most `width` columns, and the steps at which the rate is what it says beside it."""
    steps = config.steps
    schedule = _pinned(config)
    rates = [learning_rate(schedule, config.optim, step) for step in range(1, steps + 1)]
    columns = max(_FEWEST, min(width - 12, steps))
    most = max(rates)
    yield f"learning rate of {steps:,} steps, schedule={schedule.name}: optim.lr={config.optim.lr:g} at the peak"
    # Of each column the highest and the lowest rate, so that no cycle is lost.
    spans = [
        rates[n * steps // columns : max(n * steps // columns + 1, (n + 1) * steps // columns)] for n in range(columns)
    ]
    for row in range(ROWS, 0, -1):
        bottom, top = most * (row - 1) / ROWS, most * row / ROWS
        drawn = "".join("*" if max(span) > bottom and min(span) <= top else " " for span in spans)
        yield f"{top:10.3g} |{drawn.rstrip()}"
    yield f"{'':10} +{'-' * columns}"
    yield f"{'step':>10}  1{steps:>{columns - 1},}"
    for step, rate in _turns(rates):
        yield f"step {step:,}: {rate:.4g}"
    if config.batch.ramp:
        for first, rows, size in ramp_of(config).starts:
            yield f"batch of {size:,} sequences from step {first:,} on, after {rows * config.seq_len:,} tokens"


def _pinned(config: Config) -> ScheduleConfig:
    """The schedule as the first start of the run pins it."""
    total = config.steps if config.schedule.total_steps is None else config.schedule.total_steps
    return replace(config.schedule, total_steps=total)


def _turns(rates: list[float], most: int = 12) -> list[tuple[int, float]]:
    """The first and the last step, and those at which the rate begins to rise, to fall or to stay; at most so many."""
    found = [(1, rates[0])]
    for step in range(2, len(rates)):
        before, here, after = rates[step - 2 : step + 1]
        if _direction(before, here) != _direction(here, after):
            found.append((step, here))
    found.append((len(rates), rates[-1]))
    unique = list(dict(found).items())
    return unique if len(unique) <= most else [*unique[: most - 1], unique[-1]]


def _direction(one: float, other: float) -> int:
    return (other > one) - (other < one)
