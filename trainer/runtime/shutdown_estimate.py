"""How long an orderly end takes: measured, shown, and compared with the time that the scheduler will give."""

from __future__ import annotations

import os
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stoker.conf.schema import Config
from stoker.trainer.report.observer import CheckpointReport, Observer, StepRecord
from stoker.trainer.report.progress import brief

GRACE_VARIABLE = "STOKER_GRACE"  # seconds between the scheduler's signal and its SIGKILL, where it is known
CHECKPOINT_SECONDS = "checkpoint_seconds"  # of metrics.jsonl
STEPS = 2  # the current step, and the one whose message carries the request to all ranks
_RECENT = 50  # steps and lines of metrics that are used
_MARGIN = 1.5  # a deadline is met even if a save takes this much longer than those before
_UNMEASURED = 5.0  # seconds that a save, or those steps, are taken for while none has been measured


class ShutdownEstimate(Observer):
    """Seconds that an orderly end takes: the slowest recent save and two median steps."""

    name = "grace"

    def __init__(self, deadline: float | None, say: Callable[[str], None]) -> None:
        given = os.environ.get(GRACE_VARIABLE)
        self._given = float(given) if given else None
        self._shown_seconds = 0.0  # the need that was last shown, in seconds
        self._shown = self._given is not None or deadline is not None
        self._say = say
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._saves: deque[float] = deque(maxlen=3)

    def recall(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """What earlier attempts measured, from metrics.jsonl."""
        for step in steps[-_RECENT:]:
            self._steps.append(step["step_seconds"])
        self._saves.extend([step[CHECKPOINT_SECONDS] for step in steps if CHECKPOINT_SECONDS in step][-3:])

    @property
    def needed(self) -> float:
        """Seconds; 0 while nothing has been measured."""
        return STEPS * self._step_seconds + max(self._saves, default=0.0)

    def with_margin(self) -> float:
        """Seconds before a deadline at which to begin the end: with a guess for what has not been measured yet."""
        steps = STEPS * self._step_seconds if self._steps else _UNMEASURED
        return _MARGIN * (steps + max(self._saves, default=_UNMEASURED)) + 1.0

    def start(self, config: Config, resumed_from_step: int | None, total_steps: int, facts: Mapping[str, str]) -> None:
        self._show()

    def step(self, record: StepRecord) -> None:
        self._steps.append(record.step_seconds)

    def checkpoint(self, report: CheckpointReport) -> None:
        if report.error is None:
            self._saves.append(report.seconds)
            self._show()

    @property
    def _step_seconds(self) -> float:
        return statistics.median(self._steps) if self._steps else 0.0

    def _show(self) -> None:
        """Print the estimate once, and again when it has doubled."""
        if not self._shown or not self._saves or self.needed < 2 * self._shown_seconds:
            return
        self._shown_seconds = self.needed
        line = (
            f"to end takes about {brief(self.needed)} "
            f"(a save {brief(max(self._saves))}, {STEPS} steps of {brief(self._step_seconds)})"
        )
        if self._given is None:
            self._say(line)
        elif self.needed <= self._given:
            self._say(f"{line}; the scheduler gives {self._given:.0f} s")
        else:
            self._say(
                f"{line}, but the scheduler gives only {self._given:.0f} s: steps since the last checkpoint would be "
                "lost; save faster, or request more (launch.grace_seconds, the partition's GraceTime, KillWait)"
            )
