"""Processes that end with the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_LIBC = ctypes.CDLL(None)  # loaded before any fork: the loader's lock may be held in a forked process
_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Make the kernel kill this process when `parent`, or the thread of it that started this process, ends.

    Ends this process at once if `parent` has ended already. `parent` is its process id.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)
