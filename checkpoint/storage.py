"""File effects: durable writes, and reads that cannot be led out of a checkpoint or into a device."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

from checkpoint.names import REMOVED, DamagedCheckpoint, SaveFailed

_LARGEST_JSON_BYTES = 1 << 30


def write_durably(path: Path, data: bytes) -> None:
    """Writes `path`, whole or not at all, and on the disk when this returns (its directory's entry may not be)."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_blocks(path: Path, image: memoryview, block_bytes: int, proceed: Callable[[], None]) -> list[int]:
    """Writes `image` to the new file `path`, durably. Returns the CRC32 of each block of `block_bytes`.

    `proceed` is called before each block and may raise to stop. Raises FileExistsError rather than overwrite.
    """
    blocks = [image[start : start + block_bytes] for start in range(0, len(image), block_bytes)]
    checksums: list[int] = []
    stopped = threading.Event()

    def compute_checksums() -> None:
        for block in blocks:
            if stopped.is_set():
                return
            checksums.append(zlib.crc32(block))

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    computing = threading.Thread(target=compute_checksums, daemon=True)  # beside the writing: both release the GIL
    computing.start()
    try:
        for number, block in enumerate(blocks):
            proceed()
            _write_all(descriptor, block)
            _start_writeback(descriptor, number * block_bytes, len(block))
        os.fsync(descriptor)
    except BaseException:
        stopped.set()
        raise
    finally:
        computing.join()
        os.close(descriptor)
    return checksums


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _start_writeback(descriptor: int, start: int, length: int) -> None:
    """Let the disk work while we copy the next block, instead of leaving all of it to fsync.

    Linux begins to write dirty pages that are declared to be of no use any more. Nobody reads them soon, and the memory
    is better used by the training processes.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def sync_directory(path: Path) -> None:
    """Makes what was created, renamed or removed in `path` survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(directory: Path, needed_bytes: int) -> None:
    """Raises SaveFailed when the file system of `directory` has no room for `needed_bytes`."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise SaveFailed(
            f"no space for the checkpoint: this rank writes {needed_bytes:,} bytes, {free:,} are free in {directory}"
        )


def discard(path: Path, suffix: str = REMOVED) -> None:
    """Removes a directory: by name at once, so that it is never taken for a whole one, then for good.

    What cannot be deleted now keeps a name that ends in `suffix`; `fence` tries again.
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
    shutil.rmtree(target, ignore_errors=True)


def open_to_read(path: Path) -> int:
    """A descriptor of the regular file `path`. Raises DamagedCheckpoint if it is missing, a link or anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # These say that the file is not there as written. Others (no permission, a stale mount) are not damage.
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EIO):
            raise DamagedCheckpoint(f"{path}: {error.strerror}") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedCheckpoint(f"{path}: not a regular file")
    return descriptor


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
