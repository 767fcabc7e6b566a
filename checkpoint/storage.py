"""Disk-space checks, deletion, and reads that refuse links and device files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path

from stoker.checkpoint.names import MANIFEST, REMOVED, DamagedCheckpoint, SaveFailed

_LARGEST_JSON_BYTES = 1 << 30


def require_space(directory: Path, needed_bytes: int) -> None:
    """Raises SaveFailed when the file system of `directory` has no room for `needed_bytes`."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise SaveFailed(
            f"no space for the checkpoint: this rank writes {needed_bytes:,} bytes, {free:,} are free in {directory}"
        )


def discard(path: Path, suffix: str = REMOVED) -> None:
    """Removes a directory: by name at once, so that it is never taken for a whole one, then for good.

    A directory that cannot be deleted now keeps a name that ends in `suffix`; `fence` tries again.
    """
    target, count = path.with_name(path.name + suffix), 1
    while True:
        try:
            path.rename(target)
            break
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        count += 1
        target = path.with_name(f"{path.name}.{count}{suffix}")
    with contextlib.suppress(OSError):  # manifest first: after a kill the rest is no checkpoint
        (target / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)


def open_to_read(path: Path) -> int:
    """A descriptor of the regular file `path`. Raises DamagedCheckpoint if it is missing, a link or anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # These mean that the file is not as written. Others (no permission, a stale mount) are not damage.
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EIO):
            raise DamagedCheckpoint(f"{path}: {error.strerror}") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedCheckpoint(f"{path}: not a regular file")
    return descriptor


def read_line(path: Path) -> bytes:
    """The first line of a small file, without its end. Raises DamagedCheckpoint if it cannot be one of ours."""
    with open(open_to_read(path), "rb") as file:
        try:
            line = file.readline(_LARGEST_JSON_BYTES)
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: {error.strerror}") from None
    return line.removesuffix(b"\n")


def read_json_bytes(path: Path) -> bytes:
    """All of a small file. Raises DamagedCheckpoint if it cannot be one of ours."""
    descriptor = open_to_read(path)
    with open(descriptor, "rb") as file:
        if os.fstat(descriptor).st_size > _LARGEST_JSON_BYTES:
            raise DamagedCheckpoint(f"{path}: larger than any index, state or manifest")
        try:
            return file.read()
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: {error.strerror}") from None
