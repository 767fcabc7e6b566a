"""The run that a start finds: its stored config with the present overrides, or the reason why it cannot resume."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from stoker.checkpoint import DamagedCheckpoint, Remote, newest, read_owner, read_state
from stoker.conf.identity import Standing, read_identity, standing
from stoker.conf.resume import Change, check_changes, merge, pin
from stoker.conf.rundir import RunDirectory, first_tier, read_config, resolve
from stoker.conf.schema import Config, from_dict, kinds, lookup
from stoker.conf.values import ConfigError
from stoker.trainer.budget import settle_steps
from stoker.trainer.history import has_history, has_saved, nothing_to_resume
from stoker.trainer.trust import refuse_foreign_code

log = logging.getLogger(__name__)


def stored_config(run: RunDirectory, config: Config) -> Config | None:
    """The config of the run that is to be resumed; None where there is nothing to resume.

    For a run directory that was lost, or that takes a place over, it is read from the newest checkpoint, local or
    remote.
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


def resumed(
    run: RunDirectory,
    config: Config,
    stored: Config,
    overrides: Sequence[str],
    tell: Callable[[str], None],
    uses: Sequence[str],
) -> tuple[Config, list[Change]]:
    """The stored config with `overrides`, and the keys that they change."""
    if config.run.fresh:
        place = _first_place(run, config)
        where_found = place if newest(place) else config.checkpoint.remote
        raise ConfigError(f"run.fresh=true, but {where_found} holds checkpoints: name another run.dir")
    merged, changes = merge(stored, overrides)
    where_stored, id_stored = _origin(run, config)
    refuse_foreign_code(
        merged, where_stored, id_stored, trust=config.run.trust, uses=uses, overrides=overrides, tell=tell
    )
    merged.run.dir = config.run.dir  # where it was found
    merged = resolve(merged, datetime.now())
    changes = [change for change in changes if lookup(merged, change.key) != lookup(stored, change.key)]
    check_changes(changes, config.run.change)
    if merged.checkpoint.remote is not None and config.checkpoint.remote is None:
        tell(f"checkpoints are also kept in {merged.checkpoint.remote} (from {run.config})")
    return merged, changes


def refuse_replacing_run(run: RunDirectory, config: Config, overrides: Sequence[str], restarted: bool) -> None:
    """Raises ConfigError where step 1 would follow trained steps, or replace the config of another run."""
    if has_saved(run) or (has_history(run) and not restarted):
        raise ConfigError(nothing_to_resume(run, config.checkpoint.remote))
    if restarted or not run.config.exists():
        return
    stored, now = read_config(run), config
    if now.model.init_from is not None:
        from stoker.trainer.pretrained import adopt_shape

        now = adopt_shape(now, overrides)
    now = pin(settle_steps(now, overrides, first=True))
    differing = [
        f"  {key}: {lookup(stored, key)} -> {lookup(now, key)}"
        for key, kind in kinds().items()
        if kind != "free" and lookup(stored, key) != lookup(now, key)
    ]
    if differing:
        raise ConfigError(
            f"{run.path} has no checkpoint, and its config.yaml is of another run: give the command that started it, "
            "or "
            "start over with run.fresh=true, which moves that config aside:\n" + "\n".join(differing)
        )


def report_copies(run: RunDirectory, tell: Callable[[str], None]) -> None:
    """Reports a run directory that was copied or moved since it was written."""
    identity = read_identity(run)
    if identity is None:
        return
    what = standing(run, identity)
    if what is Standing.COPY:
        tell(f"{run.path} is a copy of {identity.directory}: it continues as a new run, with a new tracker run")
    elif what is Standing.UNKNOWN:
        tell(
            f"{run.path} was {identity.directory} before and continues as the same run, with the same tracker run; if "
            f"it is a copy, remove {run.identity} and set run.adopt=true: it then becomes a new run"
        )


def _first_place(run: RunDirectory, config: Config) -> Path:
    """Where checkpoints are, also before there is a link to `checkpoint.dir`."""
    elsewhere = first_tier(config)
    return run.checkpoints if elsewhere is None or run.checkpoints.exists() else elsewhere


def _origin(run: RunDirectory, config: Config) -> tuple[Path | str, str | None]:
    """The file of the stored config, and the id of the run that wrote it."""
    identity = read_identity(run)
    if run.config.exists():
        return run.config, None if identity is None else identity.run
    place = _first_place(run, config)
    found = read_owner(place) if newest(place) else Remote(str(config.checkpoint.remote)).owner()
    return place if newest(place) else str(config.checkpoint.remote), None if found is None else found.run
