"""Writing a shard file: blocks, their checksums and fsync."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

try:
    from isal.isal_zlib import crc32  # the same as zlib's, five times as fast
except ImportError:  # no build for this processor
    from zlib import crc32

_WRITE_BYTES = 32 << 20  # at once: between two such writes a save can be stopped
_PAGE_BYTES = 1 << 12


def write_blocks(
    path: Path, windows: Iterable[memoryview], block_bytes: int, proceed: Callable[[], None] = lambda: None
) -> list[int]:
    """Writes the new file `path`, durably: `windows` one after the other, each but the last of whole blocks.

    A window is written before the next one is requested. Returns the CRC32 of each block of `block_bytes`. `proceed` is
    called before each write and may raise to stop. Raises FileExistsError rather than overwrite.
    """
    checksums: list[int] = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        file = _File(descriptor)
        for window in windows:
            blocks = [window[start : start + block_bytes] for start in range(0, len(window), block_bytes)]
            with _beside(blocks, checksums):
                for start in range(0, len(window), _WRITE_BYTES):
                    proceed()
                    file.write(window[start : start + _WRITE_BYTES])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return checksums


@contextlib.contextmanager
def _beside(blocks: list[memoryview], checksums: list[int]) -> Iterator[None]:
    """Adds the CRC32s of `blocks` to `checksums` while the body writes them: both release the GIL."""
    stopped = threading.Event()

    def compute() -> None:
        for block in blocks:
            if stopped.is_set():
                return
            checksums.append(crc32(block))

    computing = threading.Thread(target=compute, daemon=True)
    computing.start()
    try:
        yield
    except BaseException:
        stopped.set()
        raise
    finally:
        computing.join()


class _File:
    """A new file that is written from its beginning to its end, past the page cache as far as that goes.

    The disk then reads the bytes in place: no processor time is spent on a copy, and no other pages are evicted for
    data that is not read soon. Bytes that do not begin or end on a page, and file systems without direct I/O, use the
    page cache.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._written = descriptor, 0
        self._can_be_direct, self._direct = hasattr(os, "O_DIRECT"), False

    def write(self, data: memoryview) -> None:
        while data:
            whole_pages = len(data) // _PAGE_BYTES * _PAGE_BYTES
            direct = self._can_be_direct and whole_pages > 0 and self._written % _PAGE_BYTES == 0
            try:
                self._go(direct)
                count = os.write(self._descriptor, data[:whole_pages] if direct else data)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                self._can_be_direct = False  # not supported by this file system or memory
                continue
            data = data[count:]
            self._written += count

    def _go(self, direct: bool) -> None:
        if direct != self._direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
            self._direct = direct
