"""Signals heard at once, also while the main thread is in a C call that does not come back.

Python runs handlers between two bytecodes of the main thread. Before that, C writes the number of every signal into a
pipe, of which a process has one: who cannot wait for the main thread shares it, and the thread that reads it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


class SignalListener:
    """Calls back from a thread of its own. Made by the main thread, once in a process; handlers stay who they are."""

    def __init__(self) -> None:
        self._calls: dict[int, Callable[[], None]] = {}
        reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(reads,), name="hearing", daemon=True)
        self._thread.start()

    def on(self, number: int, call: Callable[[], None]) -> None:
        """Have `call` called whenever the signal of this number comes, for which there must be a handler."""
        self._calls[number] = call

    def close(self) -> None:
        """Hear nothing more. For tests: a rank listens until it ends."""
        signal.set_wakeup_fd(-1)
        os.close(self._writes)
        self._thread.join()

    def _listen(self, reads: int) -> None:
        while heard := os.read(reads, 64):
            for number in dict.fromkeys(heard):
                if number in self._calls:
                    self._calls[number]()
        os.close(reads)
