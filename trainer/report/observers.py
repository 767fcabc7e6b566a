"""Observers of the loop, on global rank 0 only: metrics file, terminal, tracker.

    loop -> Observers -> MetricsFile   metrics.jsonl, one line per step; part of the run, its errors end the run,
                         but for a full disk, for which lines wait
                      -> progress      lines or a live view on the terminal
                      -> Tracker       a process that follows metrics.jsonl into wandb, tensorboard, mlflow, a CSV
                                       file, an endpoint for Prometheus, or a command for alerts
                      -> the user's    classes of `observers=[pkg.mod:Class]`, which may ask for a save or the end

Only errors of the metrics file end the run. Any other observer that fails (a closed terminal, a tracker without a
network) is reported once and switched off, and training goes on. An observer returns in microseconds: slow work belongs
to another thread or process.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TextIO, TypeVar

from stoker.conf.reasons import reason
from stoker.conf.schema import Config, LogConfig
from stoker.conf.targets import import_target, target_and_arguments
from stoker.trainer.report.metrics import MetricsFile
from stoker.trainer.report.observer import CheckpointReport, Observer, StepRecord
from stoker.trainer.report.progress import PlainProgress
from stoker.trainer.report.trackers import Tracker
from stoker.trainer.runtime.outcome import Outcome
from stoker.trainer.runtime.starts import Start

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Observers(Observer):
    """Passes every event to `metrics`, whose errors surface, then to the others, whose errors switch them off."""

    def __init__(self, metrics: MetricsFile, others: list[Observer]) -> None:
        self.metrics = metrics
        self._others = others
        self._users: list[Observer] = []  # of the user's own, those that were switched off too
        self._unmade: list[str] = []

    def add(self, other: Observer) -> None:
        self._others.append(other)

    def add_users(self, entry: Any) -> None:
        """Make and add an observer of the user's own, an entry of `observers`; one that cannot be made is reported."""
        target, arguments = target_and_arguments(entry)
        try:
            made = import_target(target)(**arguments)
            made.name = f"observer {target}"
            self._users.append(made)
            self._others.append(made)
        except Exception as error:
            logger.warning("observer %s is not made", target, exc_info=error)
            self._unmade.append(f"observer {target} cannot be made, training goes on without it: {reason(error)}")

    def stop_reason(self) -> str | None:
        """Why an observer of the user's wants the run to end after this step; None where none does."""
        asked = [(user, self._ask(user, user.stop_reason)) for user in self._living_users()]
        return next((f"{user.name}: {why}" for user, why in asked if isinstance(why, str)), None)

    def wants_save(self) -> bool:
        """Whether an observer of the user's wants a checkpoint."""
        return any(self._ask(user, user.wants_save) is True for user in self._living_users())

    def state(self) -> list[Any]:
        """What the user's observers keep in checkpoints, in the order of `observers`; None for one without."""
        return [self._ask(user, partial(_state_of, user)) for user in self._users]

    def load_state(self, states: Any) -> None:
        """The inverse of `state`, of a checkpoint whose `observers` may have been others."""
        for user, state in zip(self._users, states if isinstance(states, list) else [], strict=False):
            if state is not None:
                self._ask(user, partial(user.load_state, state))

    def _living_users(self) -> list[Observer]:
        return [user for user in self._users if user in self._others]

    def _ask(self, user: Observer, question: Callable[[], T]) -> T | None:
        """The answer of an observer; None of one that is switched off, now if it raises."""
        if user not in self._others:
            return None
        try:
            return question()
        except Exception as error:
            self._switch_off(user, error)
            return None

    def start(self, config: Config, resumed_from_step: int | None, total_steps: int, facts: Mapping[str, str]) -> None:
        self.metrics.start(config, resumed_from_step, total_steps, facts)
        self._notify(lambda other: other.start(config, resumed_from_step, total_steps, facts))
        for text in self._unmade:
            self.message(text)

    def step(self, record: StepRecord) -> None:
        waited = self.metrics.failure is not None
        self.metrics.step(record)
        failure = self.metrics.failure
        if failure is not None and not waited:
            self.message(f"{failure}: lines of metrics wait in memory until there is room")
        elif failure is None and waited:
            self.message(f"{self.metrics.path}: there is room again, and every line is written")
        self._notify(lambda other: other.step(record))

    def saving(self, step: int) -> None:
        self._notify(lambda other: other.saving(step))

    def checkpoint(self, report: CheckpointReport) -> None:
        self._notify(lambda other: other.checkpoint(report))

    def rolled_back(self, step: int) -> None:
        self.metrics.rolled_back(step)
        self._notify(lambda other: other.rolled_back(step))

    def message(self, text: str) -> None:
        self._notify(lambda other: other.message(text))

    def finish(self, outcome: str, step: int) -> None:
        self._notify(lambda other: other.finish(outcome, step))  # first: a full disk must not cost the terminal
        self.metrics.finish(outcome, step)

    def abandon(self) -> None:
        """The run has failed: end what was started. Errors are only logged: the failure of the run matters more."""
        try:
            self.finish(Outcome.FAILED, 0)
        except Exception as error:
            logger.warning("observers could not be ended", exc_info=error)

    def _notify(self, event: Callable[[Observer], None]) -> None:
        for other in tuple(self._others):
            if other not in self._others:
                continue  # switched off by the message about one before it
            try:
                event(other)
            except Exception as error:
                self._switch_off(other, error)

    def _switch_off(self, other: Observer, error: Exception) -> None:
        self._others.remove(other)
        logger.warning("%s switched off", other.name, exc_info=error)
        self.message(f"{other.name} switched off, training goes on: {reason(error)}")


def _state_of(user: Observer) -> Any:
    """The state of an observer, read back from JSON. Raises TypeError or ValueError for what JSON does not have."""
    return json.loads(json.dumps(user.state(), allow_nan=False))


def open_observers(config: Config, start: Start, screen: TextIO, log_file: TextIO | None = None) -> Observers:
    """The observers that `config` asks for. `screen` is where a person looks: a terminal, a pipe or a file.

    `log_file` gets plain lines whatever the screen shows: they are what `stoker logs` has of training.
    """
    views = [open_progress(config.log, screen)] if config.log.progress != "none" else []
    if log_file is not None:
        views.append(PlainProgress(log_file, config.log.every, "lines of training in the log"))
    observers = Observers(MetricsFile(start.run.metrics, start), views)
    endpoint = ["prometheus"] if config.prometheus.port is not None else []
    alerts = ["alerts"] if config.alerts.command is not None else []
    for kind in (*config.tracker.names, *endpoint, *alerts):
        observers.add(Tracker(kind, config.tracker, start.run, say=observers.message))
    for entry in config.observers:
        observers.add_users(entry)
    return observers


def open_progress(log: LogConfig, screen: TextIO) -> Observer:
    """The view of `log.progress`: `auto` is live on a terminal and plain elsewhere."""
    terminal = screen.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if log.progress == "live" or (log.progress == "auto" and terminal):
        from stoker.trainer.report.live import LiveProgress

        return LiveProgress(screen)
    return PlainProgress(screen, log.every)
