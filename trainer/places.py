"""The places of a run's checkpoints and their owner: checked before ranks start, marked by rank 0.

`checkpoints` in the run directory, or `checkpoint.dir` behind it, and `checkpoint.remote` each carry the id of the run
that saves there (`stoker.checkpoint.owner`).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from stoker.checkpoint import (
    NotOurs,
    Owner,
    Remote,
    claim,
    linked_place,
    make_tier,
    problem_with,
    read_mark,
    read_owner,
)
from stoker.checkpoint.names import committed
from stoker.checkpoint.remote import RemoteFailed
from stoker.conf.identity import Standing, identify, read_identity, standing
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError

log = logging.getLogger(__name__)

_LOOK_SECONDS = 10.0  # for a remote to answer; one that does not is marked before the first upload


def mine(run: RunDirectory) -> Owner | None:
    """The id that `run` has before this start; None for a first start and for a copy, which becomes a new run."""
    identity = read_identity(run)
    if identity is None or standing(run, identity) is Standing.COPY:
        return None
    return Owner(identity.run, os.path.realpath(run.path))


def adopted_link(run: RunDirectory) -> Path | None:
    """The target of a link that a user has made as `checkpoints`, if the target is empty or belongs to this run."""
    place = linked_place(run.checkpoints)
    if place is None:
        return None
    try:
        found = read_owner(place)
    except NotOurs:
        return None
    ours = mine(run)
    own = found is not None and ours is not None and found.run == ours.run
    return place if own or (found is None and not committed(place)) else None


def refuse_foreign_places(run: RunDirectory, config: Config) -> None:
    """Raises ConfigError when checkpoints would go where another run keeps its checkpoints, unless `run.adopt`."""
    if config.run.adopt:
        return
    here, ours = os.path.realpath(run.path), mine(run)
    problems: list[str | None] = []
    try:
        linked = linked_place(run.checkpoints)
        if linked is not None:
            what = f"{run.checkpoints} is a link to {linked}, which"
            problems.append(problem_with(read_owner(linked), ours, here, what))
        elif config.checkpoint.dir is not None:
            found = read_owner(Path(config.checkpoint.dir))
            problems.append(problem_with(found, ours, here, f"checkpoint.dir={config.checkpoint.dir}"))
        elif not _is_copied(run):
            problems.append(problem_with(read_mark(run.checkpoints), ours, here, str(run.checkpoints)))
        if config.checkpoint.remote is not None:
            found = _owner_of_remote(config.checkpoint.remote)
            problems.append(problem_with(found, ours, here, f"checkpoint.remote={config.checkpoint.remote}"))
    except NotOurs as error:
        raise ConfigError(str(error)) from error
    if foreign := [problem for problem in problems if problem is not None]:
        raise ConfigError("\n".join(foreign))


def is_known(config: Config) -> bool:
    """Whether the checkpoints in `checkpoint.dir` are this run's, once `refuse_foreign_places` has accepted it."""
    place = config.checkpoint.dir
    return place is not None and (config.run.adopt or read_owner(Path(place)) is not None)


def claim_places(run: RunDirectory, config: Config) -> Owner:
    """On rank 0: give the run its id and mark its places with it. Raises NotOurs, OSError, ValueError."""
    copied = _is_copied(run)
    elsewhere = Path(config.checkpoint.dir) if config.checkpoint.dir is not None else None
    owner = Owner(identify(run, recovered=_recovered(run, config)).run, os.path.realpath(run.path))
    make_tier(run.checkpoints, elsewhere, is_known(config))
    # A folder inside the run directory was copied with it, mark and all; an older version left it without one.
    own = elsewhere is None and (copied or read_mark(run.checkpoints) is None)
    claim(run.checkpoints, owner, adopt=config.run.adopt or own)
    if config.checkpoint.remote is not None:
        try:
            Remote(config.checkpoint.remote, tries=1, call_seconds=_LOOK_SECONDS).claim(owner, config.run.adopt)
        except RemoteFailed as error:  # the uploads try again
            log.warning("not marked yet: %s", error)
    return owner


def _is_copied(run: RunDirectory) -> bool:
    identity = read_identity(run)
    return identity is not None and standing(run, identity) is Standing.COPY


def _recovered(run: RunDirectory, config: Config) -> str | None:
    """The id of this directory, which has lost its own record, as marked at its other places."""
    if read_identity(run) is not None:
        return None
    here = os.path.realpath(run.path)
    owners: list[Owner | None] = []
    if config.checkpoint.dir is not None:
        owners.append(read_owner(Path(config.checkpoint.dir)))
    if config.checkpoint.remote is not None:
        owners.append(_owner_of_remote(config.checkpoint.remote))
    return next((owner.run for owner in owners if owner is not None and owner.run and owner.directory == here), None)


def _owner_of_remote(url: str) -> Owner | None:
    """None where it cannot be read now. Raises NotOurs."""
    try:
        return Remote(url, tries=1, call_seconds=_LOOK_SECONDS).owner()
    except RemoteFailed as error:
        log.info("its owner cannot be read yet: %s", error)
        return None
