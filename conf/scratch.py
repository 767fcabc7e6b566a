"""Private temporary folders of a process, removed with it or by a later process.

A folder is locked as long as its process lives. So those of processes that were killed are known, and the next process
that makes a folder for the same purpose removes them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path

_UNLOCKED_SECONDS = 60.0  # that pass at most between the making of a folder and its lock


class Scratch:
    """A folder of mode 0700 in `parent`, by default the system's for temporary files. It is removed with this object,
    or at the end of a `with` block.

    Folders in the same place whose names begin with `prefix`, and whose processes have died, are removed first.
    Raises OSError where `parent` cannot be written.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        sweep(parent, prefix)
        made = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))  # under a name that is not swept: it has no lock
        lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.path = made.rename(parent / made.name[1:])
        self._prefix = prefix
        self._remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self._remove()

    def keep(self) -> Path:
        """Keep it for a person to look at, under a name that is not swept; where it stands now."""
        kept = self.path.with_name(f"kept-{self.path.name}")
        self._remove.detach()
        self.path.rename(kept)
        return kept


def sweep(parent: Path, prefix: str) -> None:
    """Remove what dead processes of this user have left in `parent`."""
    for name, age in ((prefix, 0.0), (f".{prefix}", _UNLOCKED_SECONDS)):
        for left in parent.glob(f"{name}*"):
            with suppress(OSError):  # somebody else's, a link, or gone by now
                _remove_if_left(left, age)


def _remove_if_left(folder: Path, age: float) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid() or abs(time.time() - found.st_ctime) < age:  # also if the clock went back
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else its process lives
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _remove(folder: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # and no process that it has forked
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
