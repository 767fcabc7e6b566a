"""Writing a shard file: blocks, their checksums and fsync, in this process or in one of its own.

Run as a program, this file is the writer process: it imports the standard library and isal alone, so it costs a few
megabytes and starts in milliseconds. It is nice, maps the trainer's staging pool (anonymous memory whose descriptor it
is given), and ends by itself within a second of the trainer's death, whatever it is doing.

    trainer -- JSON lines, and with "pool" a descriptor --> socket   this program
            <- JSON lines: ready | written | blocks | error --
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path += sys.argv[3:]  # behind the standard library: where isal is

try:
    from isal.isal_zlib import crc32  # the same as zlib's, five times as fast
except ImportError:  # a processor for which nobody has built it
    from zlib import crc32

NICE = 10  # of the writer process: training comes first
_LOOK_SECONDS = 0.5  # between its looks at whether the trainer is alive
_ANSWER_SECONDS = 0.1  # between the trainer's looks at whether to go on waiting for it
_CHUNK_BYTES = 1 << 16
_WRITE_BYTES = 32 << 20  # at once: between two such writes a save can be stopped
_PAGE_BYTES = 1 << 12


class WriterDied(Exception):
    """The writer process is gone."""


def write_blocks(
    path: Path, windows: Iterable[memoryview], block_bytes: int, proceed: Callable[[], None] = lambda: None
) -> list[int]:
    """Writes the new file `path`, durably: `windows` one after the other, each but the last of whole blocks.

    A window is used up before the next one is asked for. Returns the CRC32 of each block of `block_bytes`. `proceed` is
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

    The disk then takes the bytes from where they are: no processor copies them, which training would pay for, and
    nobody's pages are driven out of memory by what nobody reads soon. What does not begin or end on a page, and file
    systems that cannot, take the usual way.
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
                self._can_be_direct = False  # this file system, or this memory, is not made for it
                continue
            data = data[count:]
            self._written += count

    def _go(self, direct: bool) -> None:
        if direct != self._direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
            self._direct = direct


def _place_of_isal() -> list[str]:
    module = sys.modules.get("isal")
    return [str(Path(module.__file__).parent.parent)] if module is not None and module.__file__ else []


class WriterProcess:
    """The trainer's side: `write_blocks` in a process of its own, which is started at once."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-S", __file__, str(theirs.fileno()), str(os.getpid()), *_place_of_isal()]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._socket, self._heard = ours, b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def use_pool(self, descriptor: int, size: int) -> None:
        """Return when the process has mapped the pool, `size` bytes of shared memory. Raises WriterDied."""
        self._send({"pool": size}, [descriptor])
        self._answer("ready", lambda: None)

    def write_blocks(
        self, path: Path, windows: Iterable[int], block_bytes: int, proceed: Callable[[], None]
    ) -> list[int]:
        """As the function of that name; of each window, which begins where the pool begins, the length is given.

        Raises WriterDied when the process has gone, and OSError as it met it. After an exception the process is ended.
        """
        try:
            self._send({"path": str(path), "block_bytes": block_bytes})
            for length in windows:
                self._send({"window": length})
                self._answer("written", proceed)
            self._send({"window": None})
            return self._answer("blocks", proceed)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _send(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode() + b"\n"], descriptors or [])
        except OSError as error:
            raise WriterDied(f"the writer process has died ({error.strerror})") from None

    def _answer(self, expected: str, proceed: Callable[[], None]) -> Any:
        self._socket.settimeout(_ANSWER_SECONDS)
        while b"\n" not in self._heard:
            proceed()
            try:
                data = self._socket.recv(_CHUNK_BYTES)
            except TimeoutError:
                continue
            except OSError as error:
                raise WriterDied(f"the writer process has died ({error.strerror})") from None
            if not data:
                raise WriterDied(f"the writer process has died (status {self._process.wait()})")
            self._heard += data
        self._socket.settimeout(None)
        line, _, self._heard = self._heard.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise OSError(*answer["error"])
        return answer[expected]


def _serve(channel: socket.socket, trainer: int) -> None:
    """Do what the trainer asks, until it goes."""
    os.nice(NICE)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # what is sent to all processes of a job is for the trainer, which saves
    threading.Thread(target=_die_with, args=(trainer,), daemon=True).start()
    pool: mmap.mmap | None = None
    messages = _messages(channel)

    def tell(**answer: Any) -> None:
        channel.sendall(json.dumps(answer).encode() + b"\n")

    def windows() -> Iterator[memoryview]:
        assert pool is not None
        for message, _ in messages:
            if message["window"] is None:
                return
            yield memoryview(pool)[: message["window"]]
            tell(written=True)

    for message, descriptor in messages:
        if "pool" in message:
            assert descriptor is not None
            pool = mmap.mmap(descriptor, message["pool"], prot=mmap.PROT_READ) if message["pool"] else None
            os.close(descriptor)
            tell(ready=True)
            continue
        try:
            tell(blocks=write_blocks(Path(message["path"]), windows(), message["block_bytes"]))
        except OSError as error:
            tell(error=[error.errno, error.strerror, error.filename])


def _messages(channel: socket.socket) -> Iterator[tuple[dict[str, Any], int | None]]:
    heard, descriptors = b"", []
    while True:
        while b"\n" not in heard:
            data, received, _, _ = socket.recv_fds(channel, _CHUNK_BYTES, 4)
            descriptors += received
            if not data:
                return
            heard += data
        line, _, heard = heard.partition(b"\n")
        message = json.loads(line)
        yield message, descriptors.pop(0) if "pool" in message else None


def _die_with(trainer: int) -> None:
    while os.getppid() == trainer:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    with contextlib.suppress(ConnectionError):
        _serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
