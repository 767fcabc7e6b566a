"""Receives signals at once, also while the main thread is in a C call that does not return.

Python runs handlers between two bytecodes of the main thread. Before that, C writes the number of every signal into a
pipe, of which a process has one. Code that cannot wait for the main thread shares the pipe and the thread that reads
it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


class SignalListener:
    """Calls back from a separate thread. Made by the main thread, once in a process; signal handlers are unchanged."""

    def __init__(self) -> None:
        self._calls: dict[int, Callable[[], None]] = {}
        reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(reads,), name="signal-listener", daemon=True)
        self._thread.start()

    def on(self, number: int, call: Callable[[], None]) -> None:
        """Call `call` whenever the signal of this number arrives; it must have a handler."""
        self._calls[number] = call

    def close(self) -> None:
        """Stop listening. For tests: a rank listens until it ends."""
        signal.set_wakeup_fd(-1)
        os.close(self._writes)
        self._thread.join()

    def _listen(self, reads: int) -> None:
        while received := os.read(reads, 64):
            for number in dict.fromkeys(received):
                if number in self._calls:
                    self._calls[number]()
        os.close(reads)
