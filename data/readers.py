"""Processes that read ahead, into memory that they share with the rank.

A reader holds no state: it gets a request for an item, writes it to a slot and replies. Requests, order and resuming
stay with the rank, so a reader can be killed at any time without loss. The shared memory is anonymous: it leaves no
name in /dev/shm.
"""

from __future__ import annotations

import mmap
import multiprocessing
import struct
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from multiprocessing.connection import Connection
from typing import NoReturn

import numpy as np

from stoker.data import forks

_REQUEST = struct.Struct("qq")  # item, slot
_DONE = b""

Read = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class _Reader:
    pid: int
    pipe: Connection


class Readers:
    """`workers` forked processes that run `read(item, out)` for the requested items, in order.

    Make it early and in the main thread: a forked process keeps the memory of its parent, and is killed when the thread
    that made it ends.
    """

    def __init__(self, read: Read, shape: tuple[int, ...], workers: int, ahead: int) -> None:
        """`shape`: of the int32 array that one item fills; `ahead`: items that each process may be ahead."""
        memory = mmap.mmap(-1, workers * ahead * prod(shape) * 4)
        self._slots = np.frombuffer(memory, np.int32).reshape(workers * ahead, *shape)
        self._free = deque(range(len(self._slots)))
        self._asked: deque[tuple[_Reader, int]] = deque()
        self._readers: deque[_Reader] = deque()
        for _ in range(workers):
            self._readers.append(self._start(read))

    @property
    def free(self) -> int:
        """How many more items can be requested."""
        return len(self._free)

    def ask(self, item: int) -> None:
        """Request `item` from the next process."""
        reader, slot = self._readers[0], self._free.popleft()
        self._readers.rotate(-1)
        try:
            reader.pipe.send_bytes(_REQUEST.pack(item, slot))
        except OSError:
            self._lost(reader)
        self._asked.append((reader, slot))

    def take(self) -> np.ndarray:
        """The item requested longest ago, int32 of `shape`; to be used before the next `ask`.

        Raises RuntimeError when its process was killed or failed; the others are ended.
        """
        reader, slot = self._asked.popleft()
        try:
            reply = reader.pipe.recv_bytes()
        except (EOFError, OSError):
            self._lost(reader)
        if reply != _DONE:
            self.close()
            raise RuntimeError(f"a data reader failed (pid {reader.pid}):\n{reply.decode()}")
        self._free.append(slot)
        return self._slots[slot]

    def discard(self) -> None:
        """Drop items that were requested and not taken."""
        while self._asked:
            self.take()

    def close(self) -> None:
        """End the processes at once. They hold no state."""
        while self._readers:
            reader = self._readers.pop()
            forks.end(reader.pid)
            reader.pipe.close()

    def _start(self, read: Read) -> _Reader:
        ours, theirs = multiprocessing.Pipe()
        pid = forks.fork(lambda: self._serve(theirs, read), [ours, *(reader.pipe for reader in self._readers)])
        theirs.close()
        return _Reader(pid, ours)

    def _serve(self, pipe: Connection, read: Read) -> None:
        while True:
            item, slot = _REQUEST.unpack(pipe.recv_bytes())
            try:
                read(item, self._slots[slot])
                pipe.send_bytes(_DONE)
            except Exception:
                pipe.send_bytes(traceback.format_exc()[-8000:].encode())

    def _lost(self, reader: _Reader) -> NoReturn:
        self._readers.remove(reader)
        reader.pipe.close()
        status = forks.wait_for(reader.pid)
        self.close()
        raise RuntimeError(f"a data reader (pid {reader.pid}) {forks.describe(status)}")
