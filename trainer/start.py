"""From overrides to the config of this start: compose, or merge with the run's stored one, refuse, resolve, pin."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from stoker.checkpoint import DamagedCheckpoint, Remote, newest, read_owner, read_state, tier_problem
from stoker.conf.compose import compose
from stoker.conf.identity import Standing, read_identity, standing
from stoker.conf.resume import Change, check_changes, merge, pin
from stoker.conf.rundir import RunDirectory, read_config, refuse_links, resolve
from stoker.conf.schema import Config, from_dict, kinds, lookup
from stoker.conf.values import ConfigError
from stoker.parallel.layout import fit
from stoker.parallel.refusals import refuse
from stoker.trainer.history import has_history, has_saved, nothing_to_resume
from stoker.trainer.places import adopted_link, is_known, refuse_foreign_places
from stoker.trainer.trust import TRAINING, refuse_foreign_code

log = logging.getLogger(__name__)


def settle_config(
    overrides: Sequence[str],
    where: Callable[[Config], tuple[int, int]],
    refitted: Callable[[str], None] | None = None,
    *,
    tell: Callable[[str], None] = log.info,
    restarted: bool = False,
    uses: Sequence[str] = TRAINING,
    check_import: bool = False,
) -> tuple[Config, list[Change]]:
    """The config of this start, and what differs from the start before.

    A run directory that holds a checkpoint is resumed: its stored config plus `overrides`. `where` says on how many
    ranks and GPUs the resulting config will run. Under a launcher that may have found another number of machines than
    before nobody is there to choose: with `refitted` a run that has been started before takes the layout that fits, and
    `refitted` is told of what that changes. `restarted`: a launcher gives a person's command once more. `uses` are the
    keys whose code this start runs (`stoker.trainer.trust`); `tell` takes lines for the person who starts. With
    `check_import` a model that comes in by `model.init_from` is compared with transformers'. Raises ConfigError for
    everything that can be known to be wrong before a rank is spawned.
    """
    config = resolve(compose(overrides), datetime.now())
    if restarted:
        config.run.fresh = False  # it spoke of the first of these starts
    run = run_directory(config)
    refuse_links(run)
    refuse_foreign_places(run, config)
    changes: list[Change] = []
    stored = _stored_config(run, config)
    if stored is not None:
        config, changes = _resumed(run, config, stored, overrides, tell, uses)
    else:
        if not config.run.fresh:
            _refuse_a_silent_beginning(run, config, overrides, restarted)
        if config.model.init_from is not None:
            from stoker.trainer.pretrained import adopt_shape  # most starts do not need what it imports

            config = adopt_shape(config, overrides)
    config = _with_adopted_link(run, config, overrides)
    if refitted is not None and run.attempt_numbers():
        world = where(config)[0]
        fitted = fit(config, world)
        for key in ("parallel.dp_replicate", "batch.micro_size"):
            old, new = lookup(config, key), lookup(fitted, key)
            if old != new:
                refitted(f"on {world} ranks {key}={old} becomes {new}")
        config = fitted
    refuse(config, *where(config))
    if check_import and stored is None and config.model.init_from is not None:
        from stoker.trainer.import_check import compare_import

        result = compare_import(config)
        if result is not None:
            tell(f"model.init_from={config.model.init_from}: {result}")
    problem = tier_problem(run.checkpoints, first_tier(config), is_known(config))
    if problem is not None:
        raise ConfigError(problem)
    if stored is not None:
        refuse_foreign_places(run, config)  # those that were stored
    _tell_of_copies(run, tell)
    return pin(config), changes


def _stored_config(run: RunDirectory, config: Config) -> Config | None:
    """The config of the run that is to be resumed; None where there is nothing to resume.

    A run directory that was lost, or that takes a place over, finds it in the newest checkpoint there or on the remote.
    """
    found_here = newest(_first_place(run, config))
    if found_here:
        if run.config.exists():
            return read_config(run)
        values = read_state(found_here[0]).get("config")
        if values is None:
            raise ConfigError(f"{run.path} has no {run.config.name}, and {found_here[0]} holds no config")
        return from_dict(values)
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


def _first_place(run: RunDirectory, config: Config) -> Path:
    """Where checkpoints are, also before there is a link to `checkpoint.dir`."""
    elsewhere = first_tier(config)
    return run.checkpoints if elsewhere is None or run.checkpoints.exists() else elsewhere


def _resumed(
    run: RunDirectory,
    config: Config,
    stored: Config,
    overrides: Sequence[str],
    tell: Callable[[str], None],
    uses: Sequence[str],
) -> tuple[Config, list[Change]]:
    """The stored config with what is said now, and what that changes."""
    if config.run.fresh:
        place = _first_place(run, config)
        where_found = place if newest(place) else config.checkpoint.remote
        raise ConfigError(f"run.fresh=true, but {where_found} holds checkpoints: name another run.dir")
    merged, changes = merge(stored, overrides)
    where_stored, id_stored = _origin(run, config)
    refuse_foreign_code(
        merged, where_stored, id_stored, trust=config.run.trust, uses=uses, overrides=overrides, tell=tell
    )
    merged.run.dir = config.run.dir  # where we found it
    merged = resolve(merged, datetime.now())
    changes = [change for change in changes if lookup(merged, change.key) != lookup(stored, change.key)]
    check_changes(changes, config.run.change)
    if merged.checkpoint.remote is not None and config.checkpoint.remote is None:
        tell(f"checkpoints are also kept in {merged.checkpoint.remote}, as {run.config} says")
    return merged, changes


def _origin(run: RunDirectory, config: Config) -> tuple[Path | str, str | None]:
    """Where the stored config stands, and the id of the run that wrote it."""
    identity = read_identity(run)
    if run.config.exists():
        return run.config, None if identity is None else identity.run
    place = _first_place(run, config)
    found = read_owner(place) if newest(place) else Remote(str(config.checkpoint.remote)).owner()
    return place if newest(place) else str(config.checkpoint.remote), None if found is None else found.run


def _refuse_a_silent_beginning(run: RunDirectory, config: Config, overrides: Sequence[str], restarted: bool) -> None:
    """Raises ConfigError where step 1 would follow steps that were trained, or another config's name."""
    if has_saved(run) or (has_history(run) and not restarted):
        raise ConfigError(nothing_to_resume(run, config.checkpoint.remote))
    if restarted or not run.config.exists():
        return
    stored, now = read_config(run), config
    if now.model.init_from is not None:
        from stoker.trainer.pretrained import adopt_shape

        now = adopt_shape(now, overrides)
    now = pin(now)
    differing = [
        f"  {key}: {lookup(stored, key)} -> {lookup(now, key)}"
        for key, kind in kinds().items()
        if kind != "free" and lookup(stored, key) != lookup(now, key)
    ]
    if differing:
        raise ConfigError(
            f"{run.path} has no checkpoint, and its config.yaml is of another run: give the command that began it, or "
            "begin anew with run.fresh=true, which sets that config aside:\n" + "\n".join(differing)
        )


def _with_adopted_link(run: RunDirectory, config: Config, overrides: Sequence[str]) -> Config:
    """A link that a person has put in the place of `checkpoints` is as good as `checkpoint.dir`."""
    if config.checkpoint.dir is not None or any(word.startswith("checkpoint.dir=") for word in overrides):
        return config
    place = adopted_link(run)
    if place is None:
        return config
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, dir=str(place)))


def _tell_of_copies(run: RunDirectory, tell: Callable[[str], None]) -> None:
    identity = read_identity(run)
    if identity is None:
        return
    what = standing(run, identity)
    if what is Standing.COPY:
        tell(f"{run.path} is a copy of {identity.directory}: it goes on as a run of its own, tracker run included")
    elif what is Standing.UNKNOWN:
        tell(
            f"{run.path} stood in {identity.directory} before and goes on as the same run, tracker run included; if it "
            f"is a copy, remove {run.identity} and say run.adopt=true: it then becomes a run of its own"
        )


def run_directory(config: Config) -> RunDirectory:
    """The run directory of a resolved config."""
    assert config.run.dir is not None
    return RunDirectory(Path(config.run.dir))


def first_tier(config: Config) -> Path | None:
    """Where a resolved config keeps checkpoints, if not in the run directory."""
    return Path(config.checkpoint.dir) if config.checkpoint.dir is not None else None
