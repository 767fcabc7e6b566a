"""Direct input and output of folders: what storage gives, and never what the page cache does.

A buffered read of a file that was read before is a copy in memory. So files are opened with O_DIRECT, and a rate counts
only if the bytes were seen to move: those that the kernel counts for this process as read from storage (`read_bytes` of
/proc/self/io), or, on file systems of other machines, those of direct reads, which pass this machine's cache by.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from stoker.trainer.probe.facts import FolderRate

BLOCK = 8 << 20  # bytes of a call
_ALIGNED = 4096
LEAST_FILE = 1 << 20
_MOST_ENTRIES = 2000  # of a folder that are looked at
_SEEN = 0.9  # share of the bytes that must be counted as read
IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
REMOTE = {"nfs", "nfs4", "lustre", "ceph", "gpfs", "beegfs", "cifs", "smb3", "9p", "virtiofs", "wekafs"}


def rates_of(what: str, folder: Path, most_bytes: int, seconds: float, write: bool) -> list[FolderRate]:
    """How fast files in `folder`, or in the nearest folder above it that exists, are read and, if asked, written.

    A scratch file of `most_bytes` at most is written and removed; without `write` the largest file of those there is
    read.
    """
    place = existing(folder)
    if write:
        return _written(what, place, most_bytes, seconds)
    file = _large_file(place)
    if file is None:
        return [FolderRate(what, str(place), "read", None, why="no file of 1 MiB to read")]
    return [read_rate(what, file, most_bytes, seconds)]


def existing(folder: Path) -> Path:
    """`folder`, or the nearest above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def read_rate(what: str, file: Path, most_bytes: int, seconds: float, direct: bool = True) -> FolderRate:
    """How fast storage gives the bytes of `file`, `most_bytes` of them or as many as come in `seconds`.

    `direct`: try O_DIRECT. Without it, or where the file system has none, the file is dropped from the page cache
    first, as far as the kernel agrees.
    """
    kind = file_system(file)
    if kind in IN_MEMORY:
        return FolderRate(what, str(file), "read", None, why=f"it is in memory ({kind})")
    try:
        descriptor, is_direct = _open(file, os.O_RDONLY, direct)
    except OSError as error:
        return FolderRate(what, str(file), "read", None, why=error.strerror or str(error))
    try:
        if not is_direct:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        before, began = _bytes_read(), time.perf_counter()
        try:
            total = _read(descriptor, most_bytes, began + seconds)
        except OSError as error:
            return FolderRate(what, str(file), "read", None, why=error.strerror or str(error))
        spent, after = max(1e-9, time.perf_counter() - began), _bytes_read()
    finally:
        os.close(descriptor)
    if not total:
        return FolderRate(what, str(file), "read", None, why="the file is empty")
    counted = before is not None and after is not None and after - before >= _SEEN * total
    if counted or (is_direct and kind in REMOTE):
        return FolderRate(what, str(file), "read", total / spent, total)
    why = "it came from the page cache" if before is not None else "the kernel does not count what storage gives"
    return FolderRate(what, str(file), "read", None, total, why)


def file_system(path: Path) -> str:
    """The kind of the file system that holds `path`, as /proc/self/mountinfo names it; empty where unknown."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        device = os.stat(path).st_dev
    except OSError:
        return ""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    kinds = [line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == wanted]
    return kinds[-1].removeprefix("fuse.") if kinds else ""


def _written(what: str, folder: Path, most_bytes: int, seconds: float) -> list[FolderRate]:
    kind = file_system(folder)
    if kind in IN_MEMORY:
        why = f"it is in memory ({kind})"
        return [FolderRate(what, str(folder), way, None, why=why) for way in ("write", "read")]
    scratch = folder / f".stoker-probe-{os.getpid()}"
    try:
        descriptor, _ = _open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, direct=True)
    except OSError as error:
        return [FolderRate(what, str(folder), "write", None, why=error.strerror or str(error))]
    try:
        try:
            with mmap.mmap(-1, BLOCK) as block:
                block.write(os.urandom(BLOCK))  # file systems may leave out zeros, or compress
                total, began = 0, time.perf_counter()
                while total < most_bytes and time.perf_counter() < began + seconds:
                    total += os.writev(descriptor, [block])
                os.fsync(descriptor)
            spent = max(1e-9, time.perf_counter() - began)
        except OSError as error:  # a full disk, a quota
            return [FolderRate(what, str(folder), "write", None, why=error.strerror or str(error))]
        finally:
            os.close(descriptor)
        written = FolderRate(what, str(folder), "write", total / spent, total)
        read = read_rate(what, scratch, most_bytes, seconds)
        return [written, FolderRate(what, str(folder), "read", read.rate, read.bytes, read.why)]
    finally:
        with suppress(OSError):
            scratch.unlink()


def _open(file: Path, flags: int, direct: bool) -> tuple[int, bool]:
    """The file, and whether it is open for direct access."""
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW if flags & os.O_CREAT else os.O_CLOEXEC
    if direct and hasattr(os, "O_DIRECT"):
        try:
            return os.open(file, flags | os.O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            with suppress(OSError):  # some file systems make the file before they refuse
                if flags & os.O_CREAT:
                    file.unlink()
    return os.open(file, flags, 0o600), False


def _read(descriptor: int, most_bytes: int, deadline: float) -> int:
    """Bytes read from the beginning. The end of a file need not be aligned: it is left out."""
    size = os.fstat(descriptor).st_size // _ALIGNED * _ALIGNED
    total = 0
    with mmap.mmap(-1, BLOCK) as block:
        while total < min(size, most_bytes) and time.perf_counter() < deadline:
            with memoryview(block) as view, view[: min(BLOCK, size - total)] as part:
                got = os.preadv(descriptor, [part], total)
            if not got:
                break
            total += got
    return total


def _bytes_read() -> int | None:
    """Bytes that this process has caused to be fetched from storage; None where the kernel does not count them."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return None


def _large_file(place: Path) -> Path | None:
    if place.is_file():
        return place if place.stat().st_size >= LEAST_FILE else None
    best, most = None, LEAST_FILE - 1
    for number, entry in enumerate(_files(place)):
        with suppress(OSError):
            if (size := entry.stat(follow_symlinks=False).st_size) > most:
                best, most = Path(entry.path), size
        if number >= _MOST_ENTRIES:
            break
    return best


def _files(place: Path) -> Iterator[os.DirEntry[str]]:
    ahead = [str(place)]
    while ahead:
        with suppress(OSError), os.scandir(ahead.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    ahead.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield entry
