"""A C call that no signal cuts short: Python runs no handler until it is over."""

from __future__ import annotations

import ctypes
import time


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def deaf_for(seconds: float) -> None:
    """Waits in the C library for a lock that this thread has itself."""
    libc, mutex, until = ctypes.CDLL(None), ctypes.create_string_buffer(64), time.time() + seconds
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_timedlock(mutex, ctypes.byref(_Time(int(until), int(until % 1 * 1e9))))
