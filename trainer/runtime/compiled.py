"""What a killed start may leave among the compiled code of torch's inductor: a library that is cut short.

The inductor has the compiler write a library in its place, and takes every file that is there for a whole one: each
later start would fail to load it. A build that has ended has removed its working folder; one that goes on holds a lock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

_WORKING = "_CxxBuild"  # ends the name of a working folder, which begins with that of the library: KEY.main
_SOURCES = (".cpp", ".h", ".hpp")


def compiled_folder() -> Path:
    """Where the inductor of this process keeps what it compiles. Loads it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def remove_unfinished_builds(folder: Path) -> list[Path]:
    """Remove what builds in the inductor's cache `folder` left unfinished, unless they go on; the files removed."""
    removed = []
    for working in folder.glob(f"*/*.main{_WORKING}"):
        name = working.name.removesuffix(_WORKING)
        lock = folder / "locks" / f"{name.removesuffix('.main')}.lock"
        with suppress(OSError):  # another start removes it, or holds the lock
            lock.parent.mkdir(exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in working.parent.glob(f"{name}.*"):
                    if path.suffix not in _SOURCES:
                        path.unlink(missing_ok=True)
                        removed.append(path)
                shutil.rmtree(working)
            finally:
                os.close(descriptor)
    if removed:
        log.warning("removed %s: a compiler was killed while it wrote there", ", ".join(map(str, removed)))
    return removed
