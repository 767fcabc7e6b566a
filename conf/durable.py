"""Files of a run directory: whole or not at all, durable where they must be, never written through a link."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from stoker.conf.reasons import reason

log = logging.getLogger(__name__)
T = TypeVar("T")

ROOM_SECONDS = 60.0  # that a rank waits for room on a full disk; its launcher waits longer
_POLL_SECONDS = 0.5
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_FOLLOWED = "is a symbolic link, and links inside a run directory are not followed when it is written: remove it"


def write_durably(path: Path, data: bytes) -> None:
    """Writes `path`, whole or not at all, and on the disk when this returns (its directory's entry may not be)."""
    write_whole(path, data, sync=True)


def write_whole(path: Path, data: bytes, sync: bool = False) -> None:
    """Writes `path`, whole or not at all; with `sync` as `write_durably`. Raises OSError naming the file."""
    temporary = path.with_name(f"{path.name}.tmp")
    with naming(path):
        try:
            with open(open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            if error.filename is None:  # opened and then failed: a partial file only takes up space
                temporary.unlink(missing_ok=True)
            raise
        temporary.replace(path)


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a file of a run directory that is written. Raises OSError for a link, naming it."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, _NOT_FOLLOWED, str(path)) from None
        raise


def touch_own(path: Path) -> None:
    """Make an empty file of a run directory. Raises OSError for a link, naming it."""
    os.close(open_own(path, os.O_WRONLY | os.O_CREAT))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds `path` to an OSError inside that has no file name, as of a bare descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise


def is_full(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, is a disk without room or a quota that is used up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__
    return False


def with_room(act: Callable[[], T], seconds: float = ROOM_SECONDS, waiting: Callable[[str], None] = log.warning) -> T:
    """The result of `act`. While the disk is full it is retried for `seconds`; `waiting` gets a line.

    Raises what `act` raises for any other reason, and the OSError of the full disk when the time is up.
    """
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            return act()
        except OSError as error:
            if not is_full(error) or time.monotonic() > deadline:
                raise
            if not told:
                waiting(f"{reason(error)}: waiting up to {seconds:.0f} s for room")
                told = True
        time.sleep(_POLL_SECONDS)


def sync_directory(path: Path) -> None:
    """Makes what was created, renamed or removed in `path` survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
