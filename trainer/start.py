"""From overrides to the config of this start: compose, or merge with the run's stored one, refuse, resolve, pin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from stoker.checkpoint import DamagedCheckpoint, Remote, newest, tier_problem
from stoker.conf.compose import compose
from stoker.conf.resume import Change, check_changes, merge, pin
from stoker.conf.rundir import RunDirectory, read_config, resolve
from stoker.conf.schema import Config, from_dict, lookup
from stoker.conf.values import ConfigError
from stoker.parallel.layout import fit
from stoker.parallel.refusals import refuse

log = logging.getLogger(__name__)


def settle_config(
    overrides: Sequence[str],
    where: Callable[[Config], tuple[int, int]],
    refitted: Callable[[str], None] | None = None,
) -> tuple[Config, list[Change]]:
    """The config of this start, and what differs from the start before.

    A run directory that holds a checkpoint is resumed: its stored config plus `overrides`. `where` says on how many
    ranks and GPUs the resulting config will run. Under a launcher that may have found another number of machines than
    before nobody is there to choose: with `refitted` a run that has been started before takes the layout that fits, and
    `refitted` is told of what that changes. Raises ConfigError for everything that can be known to be wrong before a
    rank is spawned.
    """
    config = resolve(compose(overrides), datetime.now())
    run = run_directory(config)
    changes: list[Change] = []
    stored = _stored_config(run, config)
    if stored is not None:
        if config.run.fresh:
            where_found = run.checkpoints if newest(run.checkpoints) else config.checkpoint.remote
            raise ConfigError(f"run.fresh=true, but {where_found} holds checkpoints: name another run.dir")
        merged, changes = merge(stored, overrides)
        merged.run.dir = config.run.dir  # where we found it
        merged = resolve(merged, datetime.now())
        changes = [change for change in changes if lookup(merged, change.key) != lookup(stored, change.key)]
        check_changes(changes, config.run.change)
        config = merged
    elif config.model.init_from is not None:
        from stoker.trainer.pretrained import adopt_shape  # most starts do not need what it imports

        config = adopt_shape(config, overrides)
    if refitted is not None and run.attempt_numbers():
        world = where(config)[0]
        fitted = fit(config, world)
        for key in ("parallel.dp_replicate", "batch.micro_size"):
            old, new = lookup(config, key), lookup(fitted, key)
            if old != new:
                refitted(f"on {world} ranks {key}={old} becomes {new}")
        config = fitted
    refuse(config, *where(config))
    problem = tier_problem(run.checkpoints, first_tier(config))
    if problem is not None:
        raise ConfigError(problem)
    return pin(config), changes


def _stored_config(run: RunDirectory, config: Config) -> Config | None:
    """The config of the run that is to be resumed; None where there is nothing to resume.

    A machine that has no checkpoint of the run finds it in the newest one on the remote.
    """
    if newest(run.checkpoints):
        return read_config(run)
    if config.checkpoint.remote is None:
        return None
    remote = Remote(config.checkpoint.remote)
    for step in remote.steps():
        try:
            found = remote.manifest(step)
            if found is not None:
                return from_dict(remote.state(found[0])["config"])
        except DamagedCheckpoint as damage:
            log.warning("passed over: %s", damage)
    return None


def run_directory(config: Config) -> RunDirectory:
    """The run directory of a resolved config."""
    assert config.run.dir is not None
    return RunDirectory(Path(config.run.dir))


def first_tier(config: Config) -> Path | None:
    """Where a resolved config keeps checkpoints, if not in the run directory."""
    return Path(config.checkpoint.dir) if config.checkpoint.dir is not None else None
