"""Diagnostics of a rank that makes no progress: three answers to one signal, each needing less of the rank.

The watchdog (`stoker.trainer.runtime.watchdog`) sends SIGNAL. faulthandler answers from the signal handler itself,
in any state of Python: the stacks of all threads. A thread answers if the interpreter's lock can be had, and dumps
torch's flight recorder: the last collectives, as JSON. The main thread answers if it returns from the C call it may be
in. The missing answers show where a rank hangs. Nothing of this costs anything until the signal arrives.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

from stoker.trainer.runtime.signal_listener import SignalListener

SIGNAL = signal.SIGUSR2
THREAD_ANSWERS = "the interpreter answers\n"
MAIN_ANSWERS = "the main thread answers\n"
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "1000")  # collectives kept; read when torch makes its groups


class StackDump:
    """Answers SIGNAL from now on, into `stacks` and `flight`. Made by the main thread."""

    def __init__(self, stacks: Path, flight: Path, listener: SignalListener) -> None:
        self._flight = flight
        self._file = os.open(stacks, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        signal.signal(SIGNAL, self._answer_in_main)
        faulthandler.register(SIGNAL, self._file, all_threads=True, chain=True)
        listener.on(SIGNAL, self._answer_in_thread)

    def _answer_in_main(self, _number: int, _frame: object) -> None:
        os.write(self._file, MAIN_ANSWERS.encode())

    def _answer_in_thread(self) -> None:
        try:
            self._flight.write_bytes(flight_recorder())
        finally:  # a full disk must not look like a hanging interpreter
            os.write(self._file, THREAD_ANSWERS.encode())


def flight_recorder() -> bytes:
    """The last collectives of this process, as torch's flight recorder has them: JSON."""
    import torch._C._distributed_c10d as c10d

    # NCCL keeps its own; gloo and others share one. A build of torch may have either function.
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(c10d, name, None)
        if dump is not None:
            told: bytes = dump(True, False)
            if b'"record_id"' in told:
                return told
    return b'{"entries": [], "note": "this backend of torch records no collectives"}'
