"""From overrides to the config of this start: compose, or merge with the run's stored one, refuse, resolve, pin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from checkpoint import newest
from conf.compose import compose
from conf.resume import Change, check_changes, merge, pin
from conf.rundir import RunDirectory, read_config, resolve
from conf.schema import Config, lookup
from conf.values import ConfigError
from parallel.refusals import refuse


def settle_config(overrides: Sequence[str], where: Callable[[Config], tuple[int, int]]) -> tuple[Config, list[Change]]:
    """The config of this start, and what differs from the start before.

    A run directory that holds a checkpoint is resumed: its stored config plus `overrides`. `where` says on how many
    ranks and GPUs the resulting config will run. Raises ConfigError for everything that can be known to be wrong before
    a rank is spawned.
    """
    config = resolve(compose(overrides), datetime.now())
    run = run_directory(config)
    changes: list[Change] = []
    if newest(run.checkpoints):
        if config.run.fresh:
            raise ConfigError(f"run.fresh=true, but {run.checkpoints} holds checkpoints: name another run.dir")
        stored = read_config(run)
        merged, changes = merge(stored, overrides)
        merged.run.dir = config.run.dir  # where we found it
        merged = resolve(merged, datetime.now())
        changes = [change for change in changes if lookup(merged, change.key) != lookup(stored, change.key)]
        check_changes(changes, config.run.change)
        config = merged
    refuse(config, *where(config))
    return pin(config), changes


def run_directory(config: Config) -> RunDirectory:
    """The run directory of a resolved config."""
    assert config.run.dir is not None
    return RunDirectory(Path(config.run.dir))
