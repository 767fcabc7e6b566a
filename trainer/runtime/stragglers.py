"""Per-rank work time, and detection of slow ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

FACTOR = 1.3  # times the median
STEPS = 20  # in a row
LEAST_SECONDS = 1e-3  # a shorter step is too noisy

_SCHEDULE = Path("/proc/thread-self/schedstat")


class WorkClock:
    """Seconds that the calling thread computed or was ready to, without waiting for other ranks.

    Ranks synchronise in every step, so that by the wall clock all are as slow as the slowest. What differs is the
    time on a processor and waiting for one, which Linux counts per thread. Forward and backward run in the calling
    thread; on GPUs this is the host's side only, and a slow GPU under a fast host is not seen.
    """

    def __init__(self) -> None:
        self._file = _SCHEDULE.open("rb", buffering=0) if _SCHEDULE.exists() else None
        self._last = self._now()

    def take(self) -> float:
        """Seconds since the last call."""
        last, self._last = self._last, self._now()
        return self._last - last

    def _now(self) -> float:
        if self._file is None:
            return time.thread_time()
        self._file.seek(0)
        running, waiting, _ = self._file.read().split()
        return (int(running) + int(waiting)) / 1e9


class Stragglers:
    """Reports a rank once, when it was slow for STEPS steps in a row."""

    def __init__(self) -> None:
        self._slow: dict[int, int] = {}  # steps in a row, by rank
        self._named: set[int] = set()

    def book(self, seconds: Sequence[float]) -> list[tuple[int, float]]:
        """`seconds` of work of each rank in a step; returns the ranks to report, and how many times slower they are.

        Of two ranks the faster one is the median; a single rank is never slow.
        """
        median = statistics.median_low(seconds)
        found = []
        for rank, own in enumerate(seconds):
            slow = median >= LEAST_SECONDS and own > FACTOR * median
            self._slow[rank] = self._slow.get(rank, 0) + 1 if slow else 0
            if self._slow[rank] == STEPS and rank not in self._named:
                self._named.add(rank)
                found.append((rank, own / median))
        return found
