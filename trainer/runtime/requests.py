"""Requests to a run from outside: signals, files in the run directory and a deadline.

They only set flags. During training the flags are reduced over all ranks with the step's message, so that all save
and end at the same step. Before the first step there is nothing to save: then a rank leaves at once, even from inside
a call that does not return, because a separate thread waits for the request.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial

from stoker.conf.rundir import RunDirectory
from stoker.parallel.update import ControlFlag
from stoker.trainer.runtime.outcome import Outcome
from stoker.trainer.runtime.signal_listener import SignalListener

DEADLINE_VARIABLE = "STOKER_DEADLINE"  # seconds since the epoch, set by the launcher
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LEAVE_SECONDS = 1.0  # time of an end where there is nothing to save: checks are _LOOK_SECONDS apart
_LOOK_SECONDS = 0.2  # between checks of files and the clock before the first step


def ending_of(votes: frozenset[ControlFlag]) -> Outcome | None:
    """The outcome of a run with these votes. A user's stop takes precedence over a preemption."""
    if ControlFlag.STOP in votes:
        return Outcome.STOPPED
    return Outcome.PREEMPTED if ControlFlag.PREEMPT in votes else None


def deadline_of(config_deadline: str | None) -> float | None:
    """When the run must have ended, in seconds since the epoch: the config's or the launcher's, the earlier."""
    given = os.environ.get(DEADLINE_VARIABLE)
    known = [datetime.fromisoformat(config_deadline).timestamp()] if config_deadline else []
    return min([*known, *([float(given)] if given else [])], default=None)


class Requests:
    """Requests to this rank from outside, to be reduced over all ranks."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.grace: Callable[[], float] = lambda: LEAVE_SECONDS  # that a save and the steps before it take
        self._run: RunDirectory | None = None
        self._next_attempt = 0
        self._deadline: float | None = None
        self._save_minutes: float | None = None
        self._saved_at: float | None = None  # monotonic time at which the last save, or training, began
        self._leaving: threading.Thread | None = None
        self._training = False
        self._news = threading.Event()  # for the thread that waits to leave

    def watch(
        self,
        run: RunDirectory,
        attempt: int,
        forget: bool,
        deadline: float | None = None,
        save_minutes: float | None = None,
    ) -> None:
        """Make this rank of `attempt` check the files of `run` and the clock (one rank is enough, and has one clock).

        `forget`: remove the stop and save files that exist already: they are from an earlier launch. When a launcher
        starts its ranks again, they were made meanwhile and count. A save is requested where none has begun for
        `save_minutes` of training.
        """
        run.requeue.unlink(missing_ok=True)  # this start fulfils it
        if forget:
            run.stop.unlink(missing_ok=True)
            run.save.unlink(missing_ok=True)
        self._run, self._next_attempt, self._deadline = run, attempt + 1, deadline
        self._save_minutes = save_minutes

    def listen(self, leave: Callable[[Outcome, str], None], listener: SignalListener) -> None:
        """From here on signals request a save and an orderly end.

        Until `training`, a thread calls `leave` with the outcome and the source of the request.
        """
        for number in _SIGNALS:
            signal.signal(number, self._ask)
            listener.on(number, partial(self._on_signal, number))
        self._leaving = threading.Thread(target=self._wait_to_leave, args=(leave,), daemon=True)
        self._leaving.start()

    def training(self) -> None:
        """The first step begins: from here on there is something to save."""
        self._training = True
        self._saved_at = time.monotonic()
        self._news.set()
        if self._leaving is not None:
            self._leaving.join()

    def votes(self) -> frozenset[ControlFlag]:
        run = self._run
        stop = self.signal == signal.SIGINT or (run is not None and run.stop.exists())
        preempt = self.signal not in (None, signal.SIGINT) or self._deadline_is_near()
        preempt = preempt or (run is not None and run.requeue.exists())
        save = (run is not None and run.save.exists()) or self._save_is_due()
        superseded = run is not None and run.attempt(self._next_attempt).exists()
        cast = {
            ControlFlag.STOP: stop,
            ControlFlag.PREEMPT: preempt,
            ControlFlag.SAVE: save,
            ControlFlag.SUPERSEDED: superseded,
        }
        return frozenset(flag for flag, yes in cast.items() if yes)

    def why(self) -> str:
        """The source of the request, for messages; empty if there is none."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        if self._run is not None and self._run.stop.exists():
            return f"the file {self._run.stop.name}"
        if self._run is not None and self._run.requeue.exists():
            return f"the file {self._run.requeue.name}"
        if self._deadline is not None and self._deadline_is_near():
            return f"the deadline at {datetime.fromtimestamp(self._deadline):%H:%M:%S}"
        return ""

    def saving(self) -> None:
        """A save begins: it fulfils all requests for one until now."""
        self._saved_at = time.monotonic()
        if self._run is not None:
            self._run.save.unlink(missing_ok=True)

    def _save_is_due(self) -> bool:
        if self._save_minutes is None or self._saved_at is None:
            return False
        return time.monotonic() - self._saved_at >= self._save_minutes * 60

    def _deadline_is_near(self) -> bool:
        return self._deadline is not None and time.time() + self.grace() >= self._deadline

    def _ask(self, number: int, _frame: object) -> None:
        self.signal = number

    def _on_signal(self, number: int) -> None:
        if self.signal is None:
            self.signal = number  # the handler itself may be waiting for the main thread
        self._news.set()

    def _wait_to_leave(self, leave: Callable[[Outcome, str], None]) -> None:
        while not self._training:
            outcome = ending_of(self.votes())
            if outcome is not None:
                leave(outcome, self.why())
            self._news.wait(_LOOK_SECONDS)
            self._news.clear()
