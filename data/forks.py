"""Forked processes of a rank: they end with it, ignore its signals, and are ended at once.

A child never outlives its rank. It ignores signals, because Ctrl-C and a scheduler's warning reach the whole process
group, and the rank still needs rows for the steps before its last save. It cleans up nothing that it inherited.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Protocol

from stoker.conf.parent_death import die_with

LEFT_TO_THE_RANK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Closable(Protocol):
    def close(self) -> None: ...


def fork(work: Callable[[], None], not_for_it: Iterable[Closable] = ()) -> int:
    """Run `work` in a forked process, which ends with it, and return its pid. It closes `not_for_it` first: the rank's
    ends of pipes, which would otherwise stay open when the rank closes them.

    Call it in the main thread: the process is killed when the thread that made it ends.
    """
    rank = os.getpid()
    # No signal may arrive in the new process while it still has the rank's handlers.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_RANK)
    pid = os.fork()
    if pid == 0:
        try:
            _settle(rank, mask)
            for end in not_for_it:
                end.close()
            work()
        finally:
            os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def end(pid: int) -> int | None:
    """Kill a child, which holds no state, and wait for it; see `wait_for`."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return wait_for(pid)


def wait_for(pid: int) -> int | None:
    """The exit status of a child, negative for a signal; None when another call has collected it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None


def describe(status: int | None) -> str:
    """How a reader ended, for the error that its rank raises."""
    if status is None or status >= 0:
        return f"ended with exit status {status}"
    hints = {
        signal.SIGKILL: ": most often because memory ran out; lower data.workers or data.prefetch",
        signal.SIGBUS: ": a file it reads was cut short, or its disk failed",
    }
    number = signal.Signals(-status)
    return f"was killed by {number.name}{hints.get(number, '')}"


def _settle(rank: int, mask: set[int]) -> None:
    gc.freeze()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not forked: waiting for them would never end
    for number in LEFT_TO_THE_RANK:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    die_with(rank)
