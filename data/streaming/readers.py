"""Processes that read and tokenise windows for a rank.

They are like the processes of `stoker.data.readers`: forked early, holding no state. What they read has
no known size, so each window is returned in separate anonymous memory (memfd), whose descriptor is passed over a
socket: nothing is copied, and no name is left behind.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from stoker.data import forks
from stoker.data.streaming.assignment import Skip
from stoker.data.streaming.shuffle_windows import Window

_MOST = 1 << 20  # bytes of one message
_MOST_REQUESTS = 8  # requests to a reader without a reply

Key = tuple[int, int]  # source, window
Read = Callable[[Key, Sequence[Skip] | None], Window]


@dataclass
class _Reader:
    pid: int
    socket: socket.socket
    asked: deque[Key] = field(default_factory=deque)


class WindowReaders:
    """`workers` forked processes that read windows in order of request; with none, `take` reads in this process.

    Make it in the main thread: a forked process is killed when the thread that made it ends.
    """

    def __init__(self, read: Read, workers: int) -> None:
        self._read = read
        self._readers: list[_Reader] = []
        self._known: dict[Key, Sequence[Skip] | None] = {}  # of all windows requested and not taken
        self._waiting: deque[Key] = deque()  # not yet sent to a reader
        self._ready: dict[Key, Window] = {}
        for _ in range(workers):
            self._readers.append(self._start())

    def ask(self, key: Key, known: Sequence[Skip] | None) -> None:
        """Request a window. `known`: see `ShuffleWindows.read`."""
        if key in self._known:
            return
        self._known[key] = known
        if self._readers:
            self._waiting.append(key)
            self._send()

    def take(self, key: Key) -> Window:
        """A requested window. Raises the reader's error: Damaged, ValueError, or RuntimeError for a lost reader."""
        if not self._readers:
            return self._read(key, self._known.pop(key))
        while key not in self._ready:
            busy = [reader for reader in self._readers if reader.asked]
            self._receive(next((reader for reader in busy if key in reader.asked), busy[0]))
            self._send()
        del self._known[key]
        return self._ready.pop(key)

    def discard(self) -> None:
        """Drop windows that were requested and not taken."""
        self._waiting.clear()
        for reader in self._readers:
            while reader.asked:
                with suppress(ValueError):  # its errors do not matter
                    self._receive(reader)
        self._known.clear()
        self._ready.clear()

    def close(self) -> None:
        """End the processes at once. They hold no state."""
        while self._readers:
            reader = self._readers.pop()
            forks.end(reader.pid)
            reader.socket.close()

    def _start(self) -> _Reader:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = forks.fork(lambda: _serve(theirs, self._read), [ours, *(reader.socket for reader in self._readers)])
        theirs.close()
        return _Reader(pid, ours)

    def _send(self) -> None:
        """Keep all readers busy. Requests are bounded: a full socket in each direction would be a deadlock."""
        while self._waiting:
            reader = min(self._readers, key=lambda reader: len(reader.asked))
            if len(reader.asked) == _MOST_REQUESTS:
                return
            key = self._waiting.popleft()
            known = self._known[key]
            request = json.dumps([*key, None if known is None else [list(skip) for skip in known]]).encode()
            try:
                reader.socket.send(request)
            except OSError:
                self._lost(reader)
            reader.asked.append(key)

    def _receive(self, reader: _Reader) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(reader.socket, _MOST, 1)
        except OSError:
            message, descriptors = b"", []
        if not message:
            self._lost(reader)
        key = reader.asked.popleft()
        if not descriptors:
            kind, text = json.loads(message)
            del self._known[key]
            raise (ValueError if kind == "input" else RuntimeError)(text)
        self._ready[key] = _map(descriptors[0], json.loads(message))

    def _lost(self, reader: _Reader) -> NoReturn:
        self._readers.remove(reader)
        reader.socket.close()
        status = forks.wait_for(reader.pid)
        self.close()
        raise RuntimeError(f"a data reader (pid {reader.pid}) {forks.describe(status)}")


def _serve(end: socket.socket, read: Read) -> None:
    while request := end.recv(_MOST):
        source, number, known = json.loads(request)
        try:
            window = read((source, number), None if known is None else [Skip(*skip) for skip in known])
        except ValueError as error:  # of the data: the message suffices
            end.send(json.dumps(["input", str(error)[:8000]]).encode())
        except Exception:
            end.send(json.dumps(["defect", f"a data reader failed:\n{traceback.format_exc()[-8000:]}"]).encode())
        else:
            _send(end, window)


def _send(end: socket.socket, window: Window) -> None:
    head = {
        "dtype": window.ids.dtype.name,
        "tokens": len(window.ids),
        "documents": len(window.starts),
        "bytes": window.bytes,
        "retries": window.retries,
        "leftovers": window.leftovers,
        "skips": [list(skip) for skip in window.skips],
    }
    descriptor = _memory()
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(window.starts.tobytes())
            file.write(window.ids.tobytes())
        socket.send_fds(end, [json.dumps(head).encode()], [descriptor])
    finally:
        os.close(descriptor)


def _memory() -> int:
    """A descriptor of memory, or of a file, without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("window")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _map(descriptor: int, head: dict) -> Window:
    try:
        size = os.fstat(descriptor).st_size
        memory = mmap.mmap(descriptor, size, prot=mmap.PROT_READ) if size else b""
    finally:
        os.close(descriptor)
    starts = np.frombuffer(memory, np.int64, head["documents"])
    ids = np.frombuffer(memory, head["dtype"], head["tokens"], offset=starts.nbytes)
    skips = tuple(Skip(*skip) for skip in head["skips"])
    return Window(ids, starts, skips, head["bytes"], head["retries"], head["leftovers"])
