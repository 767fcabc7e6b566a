"""How many steps a run takes, where its config gives tokens or epochs instead.

A budget becomes `steps` at the first start. From then on the number of steps is what the run keeps, as its schedule is
made for it; a budget that is given anew makes it anew.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from stoker.conf.limits import LIMITS
from stoker.conf.overrides import parse
from stoker.conf.ramp import ramp_of
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError


def settle_steps(
    config: Config, overrides: Sequence[str], *, first: bool, tell: Callable[[str], None] | None = None
) -> Config:
    """`config` with the `steps` that its budget makes: `tokens`, or at a `first` start `data.epochs` without `steps`.

    Opens the data for the length of an epoch. Raises ConfigError for two budgets at once, and where no number of steps
    follows from `data.epochs`.
    """
    given = {override.key for override in map(parse, overrides)}
    if "steps" in given:
        if "tokens" in given and config.tokens is not None:
            raise ConfigError(
                f"steps={config.steps} with tokens={config.tokens:g}: both say how long the run is, so leave one out"
            )
        return dataclasses.replace(config, tokens=None)
    if any(limit.broken(config) for limit in LIMITS):
        return config  # `validate` says what is wrong
    ramp = ramp_of(config)
    if config.tokens is not None and (first or "tokens" in given):
        rows = math.ceil(config.tokens / config.seq_len)
        steps = ramp.steps_of(rows)
        steps += ramp.rows_before(steps + 1) < rows
        what = f"tokens={config.tokens:g}"
    elif config.tokens is None and config.data.epochs is not None and (first or "data.epochs" in given):
        steps = _steps_of_epochs(config)
        what = f"data.epochs={config.data.epochs}"
    else:
        return config
    if tell is not None:
        before = f"{ramp.size(1)} to " if config.batch.ramp else ""
        tell(f"{what} makes steps={steps} of {before}{config.batch.size} x {config.seq_len} tokens")
    return dataclasses.replace(config, steps=steps)


def _steps_of_epochs(config: Config) -> int:
    if config.data.mode == "streaming":
        raise ConfigError(
            f"data.epochs={config.data.epochs} with data.mode=streaming: how many steps that makes is known only when "
            "all has been read. steps=N or tokens=N beside it sets the schedule, and the run ends with the data if "
            "they end first"
        )
    from stoker.data import open_rows  # most starts need no data here

    try:
        rows = open_rows(config, "train").total_rows
    except ValueError as error:
        raise ConfigError(str(error)) from error
    assert rows is not None, "data.epochs is set"
    ramp = ramp_of(config)
    if rows < ramp.size(1):
        raise ConfigError(
            f"data.epochs={config.data.epochs} makes {rows} sequences of {config.seq_len} tokens, fewer than "
            f"batch.size={ramp.size(1)}: lower batch.size or seq_len, or raise data.epochs"
        )
    return ramp.steps_of(rows)
