"""The owner of a place: a file in every place where checkpoints are kept, with the id of their run.

Two runs in one place would delete each other's checkpoints. The first run makes the mark, and it is
changed only at a user's request (`run.adopt=true`).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from stoker.checkpoint.names import OWNER, DamagedCheckpoint, committed, one_line
from stoker.checkpoint.stored import read_state
from stoker.conf.durable import open_own, write_durably
from stoker.conf.records import parse_json

_MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class Owner:
    """The contents of the mark."""

    run: str  # id
    directory: str  # of the run, without links


class NotOurs(ValueError):
    """The place is marked as another run's. One line."""


def encode_owner(owner: Owner) -> bytes:
    return (json.dumps(asdict(owner)) + "\n").encode()


def decode_owner(data: bytes, where: str) -> Owner:
    """Raises NotOurs for an invalid mark: something other than a run uses this place."""
    try:
        owner = Owner(**parse_json(data))
        if not isinstance(owner.run, str) or not isinstance(owner.directory, str):
            raise TypeError("no id of a run")
    except (ValueError, TypeError) as error:
        raise NotOurs(f"{where} cannot be read: {one_line(error)}; remove it if the place is this run's") from None
    return owner


def read_mark(place: Path) -> Owner | None:
    """The mark of a directory. Raises NotOurs for an invalid one."""
    try:
        with open(place / OWNER, "rb") as file:
            return decode_owner(file.read(_MOST_BYTES), str(place / OWNER))
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_owner(place: Path) -> Owner | None:
    """The mark of a directory; without one, the run whose directory the newest checkpoint in it names.

    Older versions left no mark. Their owner has no id (`""`). Raises NotOurs.
    """
    marked = read_mark(place)
    if marked is not None:
        return marked
    for checkpoint in committed(place):
        with contextlib.suppress(DamagedCheckpoint, OSError, ValueError, KeyError, TypeError):
            return Owner("", os.path.realpath(read_state(checkpoint)["config"]["run"]["dir"]))
    return None


def problem_with(found: Owner | None, mine: Owner | None, here: str, place: str) -> str | None:
    """Why the run in `here` may not keep checkpoints in `place`, which is marked with `found`; None if it may.

    `mine` is None for a directory without an id: then a mark that names this directory is of the run that was
    here before it was lost.
    """
    if found is None or (found.directory == here and (mine is None or not found.run)):
        return None
    if mine is not None and found.run == mine.run:
        return None
    return (
        f"{place} holds the checkpoints of another run, that of {found.directory}: name another place, or take it over "
        "with run.adopt=true, after which that run can no longer save there"
    )


def check_owner(place: Path, mine: Owner) -> None:
    """Raises NotOurs when another run has taken the directory over since it was claimed."""
    problem = problem_with(read_owner(place), mine, mine.directory, str(place))
    if problem is not None:
        raise NotOurs(problem)


def claim(place: Path, mine: Owner, adopt: bool) -> None:
    """Mark a directory as this run's. Raises NotOurs if it is another's, unless `adopt`; OSError."""
    mark = place / OWNER
    temporary = place / f".{OWNER}.{secrets.token_hex(4)}"
    found = read_owner(place)
    if found == mine:
        return
    problem = problem_with(found, mine, mine.directory, str(place))
    if problem is not None and not adopt:
        raise NotOurs(problem)
    if mark.exists():
        write_durably(mark, encode_owner(mine))
        return
    with open(open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(encode_owner(mine))
    try:
        os.link(temporary, mark)  # of two runs at the same time one is first
    except FileExistsError:
        check_owner(place, mine)
    finally:
        temporary.unlink(missing_ok=True)
