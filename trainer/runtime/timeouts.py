"""Timeouts of collectives in the three phases of a run: its start, its first step, which may compile, and the rest.

The watchdog (`stoker.trainer.runtime.watchdog`) reports a hang, with stacks and the last collectives of every rank.
A collective that times out tells less, and NCCL ends the process with it. So a collective may always take longer than
the watchdog waits: as long as the rarest phase of a rank for which the others wait, and LATE_SECONDS more.
"""

from __future__ import annotations

import statistics
from collections import deque

from stoker.parallel.mesh import Mesh
from stoker.trainer.runtime.watchdog import GENEROUS, LEAST_GENEROUS_SECONDS, LEAST_SECONDS, STEPS

LATE_SECONDS = 60.0  # until the watchdogs of all machines have looked, examined their ranks and written the report
PACES = 20  # steps over which the pace is taken, anew at each of their multiples


class Timeouts:
    """Seconds for collectives; `least` is parallel.timeout_seconds, `hang_seconds` launch.hang_seconds."""

    def __init__(self, least: float, hang_seconds: float | None) -> None:
        self._least, self._given = least, hang_seconds
        self._paces: deque[float] = deque(maxlen=PACES)
        self._steps = 0

    def at_start(self) -> float:
        """Until the first step is done: data are opened, the model is built and compiled, a checkpoint is read."""
        return self._above(self._given or LEAST_SECONDS)

    def after_step(self, seconds: float, mesh: Mesh) -> None:
        """A step took so long: now and then, set the timeout of `mesh` for those that follow."""
        self._steps += 1
        if self._steps > 1:  # the first one does not show the pace
            self._paces.append(seconds)
        if self._steps == 2 or self._steps % PACES == 0:
            mesh.set_timeout(self._above(self._given or max(LEAST_SECONDS, STEPS * statistics.median(self._paces))))

    def _above(self, usual: float) -> float:
        """`usual`: the watchdog's limit for the phases of every step."""
        longest = GENEROUS * usual
        if self._given is None:
            longest = max(longest, LEAST_GENEROUS_SECONDS)
        return max(self._least, longest + LATE_SECONDS)
