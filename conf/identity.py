"""The id of the run in a directory, by which copies, moved directories and places of other runs are recognised.

`RUN/run.json` keeps the id, and the path of the directory when it was written. A copy has the same id at another path
while the original still exists: it becomes a new run when it is started.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from stoker.conf.durable import write_durably
from stoker.conf.records import read_json, record_of
from stoker.conf.rundir import RunDirectory
from stoker.conf.values import ConfigError


@dataclass(frozen=True)
class Identity:
    """`run.json`."""

    run: str  # 32 hexadecimal digits
    directory: str  # its path then, without links
    inode: int  # of the directory
    saved: bool = False  # whether a checkpoint has been committed since its first step


class Standing(enum.Enum):
    """The relation of a directory to the one in which its `run.json` was written."""

    SAME = "same"  # the same one, perhaps renamed or mounted elsewhere
    COPY = "copy"  # the original still exists at its path
    UNKNOWN = "unknown"  # moved between file systems, or a copy whose original cannot be seen


def read_identity(run: RunDirectory) -> Identity | None:
    """None where no start has written one. Raises ConfigError for one that cannot be read."""
    try:
        identity = record_of(read_json(run.identity), Identity)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run.identity} cannot be read: {error}; remove it, and the run gets a new id") from error
    if not _is_id(identity.run):
        raise ConfigError(f"{run.identity} holds no id of a run; remove it, and the run gets a new id")
    return identity


def standing(run: RunDirectory, identity: Identity) -> Standing:
    """Whether `run` is the directory that `identity` was written in."""
    here = os.path.realpath(run.path)
    if here == identity.directory or os.stat(run.path).st_ino == identity.inode:
        return Standing.SAME
    original = RunDirectory(Path(identity.directory))
    try:
        other = read_identity(original)
    except ConfigError:
        other = None
    if other is not None and other.run == identity.run:
        return Standing.COPY
    return Standing.UNKNOWN


def identify(run: RunDirectory, recovered: str | None = None) -> Identity:
    """The identity of `run`, written down: a new one for a first start and for a copy.

    `recovered`: the id under which other places hold checkpoints of this directory, which was lost.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    here, inode = os.path.realpath(run.path), os.stat(run.path).st_ino
    known = read_identity(run)
    if known is None:
        identity = Identity(recovered or secrets.token_hex(16), here, inode)
    elif standing(run, known) is Standing.COPY:
        identity = Identity(secrets.token_hex(16), here, inode, known.saved)
    else:
        identity = dataclasses.replace(known, directory=here, inode=inode)
    if identity != known:
        write_identity(run, identity)
    return identity


def write_identity(run: RunDirectory, identity: Identity) -> None:
    write_durably(run.identity, (json.dumps(asdict(identity)) + "\n").encode())


def _is_id(text: str) -> bool:
    return len(text) == 32 and all(letter in "0123456789abcdef" for letter in text)
