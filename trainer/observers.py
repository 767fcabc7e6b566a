"""What a person and other tools see of a run: observers of the loop, on global rank 0 only.

    loop -> Observers -> MetricsFile   metrics.jsonl, one line per step; part of the run, its errors end the run
                      -> progress      lines or a live view on the terminal
                      -> Tracker       a process that follows metrics.jsonl into wandb or tensorboard

Only the metrics file matters to the run. Whatever else fails (a closed terminal, a tracker without a network) is
named once and switched off, and training goes on. An observer returns in microseconds: slow work belongs to another
thread or process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from conf.rundir import RunDirectory
from conf.schema import Config

if TYPE_CHECKING:
    from trainer.metrics import MetricsFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """One step as it is shown and stored. A loss or norm that is not finite is passed as it is (nan, inf)."""

    step: int  # global batches attempted
    updates: int  # optimizer steps taken
    loss: float | None  # nats per valid token
    grad_norm: float | None  # before clipping
    lr: float
    tokens: int  # valid tokens trained so far
    tokens_per_second: float
    step_seconds: float  # wall time since the step before
    data_seconds: float  # of which waiting for rows
    skipped: bool = False  # no update: the loss or the norm was not finite
    val_loss: float | None = None  # nats per valid token, at the steps that evaluate
    extra: Mapping[str, float] = field(default_factory=dict)  # more numbers for metrics.jsonl and trackers


class CheckpointReport(Protocol):
    """What observers read of a save that ended."""

    @property
    def step(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def bytes(self) -> int: ...
    @property
    def error(self) -> str | None: ...
    @property
    def stall_seconds(self) -> float: ...
    @property
    def write_bytes_per_second(self) -> float: ...


class Observer:
    """Sees a run go by. Every event is optional."""

    name = "observer"

    def start(self, config: Config, resumed_from_step: int | None, total_steps: int, facts: Mapping[str, str]) -> None:
        """Before the first step. `facts` are for people: {"layout": "dp_shard 2, ZeRO 1", ...}."""

    def step(self, record: StepRecord) -> None:
        """After every step, in order."""

    def saving(self, step: int) -> None:
        """A save of the state after `step` has begun."""

    def checkpoint(self, report: CheckpointReport) -> None:
        """A save has ended, well or not."""

    def rolled_back(self, step: int) -> None:
        """The run has gone back to `step`: what came after it will be told anew."""

    def message(self, text: str) -> None:
        """One line for the person who watches."""

    def finish(self, outcome: str, step: int) -> None:
        """The run ends here, at `step`; no event follows. Returns within seconds."""


class Observers(Observer):
    """Passes every event to `metrics`, whose errors surface, then to the others, whose errors switch them off."""

    def __init__(self, metrics: MetricsFile, others: list[Observer]) -> None:
        self.metrics = metrics
        self._others = others

    def add(self, other: Observer) -> None:
        self._others.append(other)

    def start(self, config: Config, resumed_from_step: int | None, total_steps: int, facts: Mapping[str, str]) -> None:
        self.metrics.start(config, resumed_from_step, total_steps, facts)
        self._tell(lambda other: other.start(config, resumed_from_step, total_steps, facts))

    def step(self, record: StepRecord) -> None:
        self.metrics.step(record)
        self._tell(lambda other: other.step(record))

    def saving(self, step: int) -> None:
        self._tell(lambda other: other.saving(step))

    def checkpoint(self, report: CheckpointReport) -> None:
        self._tell(lambda other: other.checkpoint(report))

    def rolled_back(self, step: int) -> None:
        self.metrics.rolled_back(step)
        self._tell(lambda other: other.rolled_back(step))

    def message(self, text: str) -> None:
        self._tell(lambda other: other.message(text))

    def finish(self, outcome: str, step: int) -> None:
        self._tell(lambda other: other.finish(outcome, step))  # first: a full disk must not cost the terminal
        self.metrics.finish(outcome, step)

    def _tell(self, event: Callable[[Observer], None]) -> None:
        for other in tuple(self._others):
            if other not in self._others:
                continue  # switched off by the message about one before it
            try:
                event(other)
            except Exception as error:
                self._others.remove(other)
                logger.warning("%s switched off", other.name, exc_info=error)
                reason = str(error).partition("\n")[0] or type(error).__name__
                self.message(f"{other.name} switched off, training goes on: {reason}")


def open_observers(config: Config, run_dir: Path, screen: TextIO) -> Observers:
    """The observers that `config` asks for. `screen` is where a person looks: a terminal, a pipe or a file."""
    from trainer.metrics import MetricsFile  # here, because the three build on this module
    from trainer.progress import open_progress
    from trainer.trackers import Tracker

    run = RunDirectory(run_dir)
    views = [open_progress(config.log, screen)] if config.log.progress != "none" else []
    observers = Observers(MetricsFile(run.metrics), views)
    if config.tracker.name != "none":
        observers.add(Tracker(config.tracker, run, say=observers.message))
    return observers
