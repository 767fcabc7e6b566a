"""Observers of the loop, on global rank 0 only: metrics file, terminal, tracker.

    loop -> Observers -> MetricsFile   metrics.jsonl, one line per step; part of the run, its errors end the run,
                         but for a full disk, for which lines wait
                      -> progress      lines or a live view on the terminal
                      -> Tracker       a process that follows metrics.jsonl into wandb or tensorboard

Only errors of the metrics file end the run. Any other observer that fails (a closed terminal, a tracker without a
network) is reported once and switched off, and training goes on. An observer returns in microseconds: slow work belongs
to another thread or process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from stoker.conf.reasons import reason
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config, LogConfig
from stoker.trainer.report.metrics import MetricsFile
from stoker.trainer.report.observer import CheckpointReport, Observer, StepRecord
from stoker.trainer.report.progress import PlainProgress
from stoker.trainer.report.trackers import Tracker
from stoker.trainer.runtime.outcome import Outcome

logger = logging.getLogger(__name__)


class Observers(Observer):
    """Passes every event to `metrics`, whose errors surface, then to the others, whose errors switch them off."""

    def __init__(self, metrics: MetricsFile, others: list[Observer]) -> None:
        self.metrics = metrics
        self._others = others

    def add(self, other: Observer) -> None:
        self._others.append(other)

    def start(self, config: Config, resumed_from_step: int | None, total_steps: int, facts: Mapping[str, str]) -> None:
        self.metrics.start(config, resumed_from_step, total_steps, facts)
        self._notify(lambda other: other.start(config, resumed_from_step, total_steps, facts))

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
                self._others.remove(other)
                logger.warning("%s switched off", other.name, exc_info=error)
                self.message(f"{other.name} switched off, training goes on: {reason(error)}")


def open_observers(config: Config, run_dir: Path, screen: TextIO, log_file: TextIO | None = None) -> Observers:
    """The observers that `config` asks for. `screen` is where a person looks: a terminal, a pipe or a file.

    `log_file` gets plain lines whatever the screen shows: they are what `stoker logs` has of training.
    """
    run = RunDirectory(run_dir)
    views = [open_progress(config.log, screen)] if config.log.progress != "none" else []
    if log_file is not None:
        views.append(PlainProgress(log_file, config.log.every, "lines of training in the log"))
    observers = Observers(MetricsFile(run.metrics), views)
    if config.tracker.name != "none":
        observers.add(Tracker(config.tracker, run, say=observers.message))
    return observers


def open_progress(log: LogConfig, screen: TextIO) -> Observer:
    """The view of `log.progress`: `auto` is live on a terminal and plain elsewhere."""
    terminal = screen.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if log.progress == "live" or (log.progress == "auto" and terminal):
        from stoker.trainer.report.live import LiveProgress

        return LiveProgress(screen)
    return PlainProgress(screen, log.every)
