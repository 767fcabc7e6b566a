"""The ledger: results of steps on their way from the device, and what ranks conclude from them.

A result is read one step late, so that the host is always a step ahead of the device and never drains it. Only before
something that needs the numbers (a save, the end) is everything settled at once. All ranks read the same results at
the same steps, so they come to the same verdicts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from conf.schema import Config
from parallel.update import StepResult
from trainer.observers import Observers, StepRecord
from trainer.outcome import Outcome
from trainer.process import Phases


@dataclass
class Progress:
    """How far a run has come. `step` numbers the global batches attempted, `updates` the optimizer steps taken."""

    step: int = 0
    updates: int = 0
    tokens: int = 0  # valid tokens of the steps so far
    skipped_in_a_row: int = 0
    loss: float | None = None  # of the last step
    val_loss: float | None = None  # of the last evaluation
    val_step: int | None = None  # after which that was


@dataclass(frozen=True)
class Verdict:
    """What all ranks do next: go on, save, or end with an outcome."""

    outcome: Outcome | None = None
    save: bool = False  # somebody asks for a checkpoint; every result has been read for it


@dataclass(frozen=True)
class _Entry:
    step: int
    lr: float
    result: StepResult
    val_loss: float | None
    step_seconds: float
    data_seconds: float
    extra: Mapping[str, float]


class Ledger:
    """Books steps into `progress` and, on global rank 0, tells the observers of them."""

    def __init__(self, config: Config, progress: Progress, observers: Observers | None, phase: Phases) -> None:
        self._limit = config.nonfinite.limit
        self._scaled = config.precision == "fp16"
        self._failing = config.checkpoint.on_error == "fail"
        self._progress, self._observers, self._phase = progress, observers, phase
        self._open: list[_Entry] = []
        self._last_entry = time.perf_counter()

    def enter(
        self, step: int, lr: float, result: StepResult, val_loss: float | None, extra: Mapping[str, float]
    ) -> None:
        """A step has been handed to the device. `extra` are metrics of some steps only."""
        now = time.perf_counter()
        data_seconds = self._phase.take_seconds().get("data", 0.0)
        self._open.append(_Entry(step, lr, result, val_loss, now - self._last_entry, data_seconds, extra))
        self._last_entry = now

    def settle(self, *, everything: bool) -> Verdict:
        """Read the results that are due: all but the newest, or all; all too when a save is asked for."""
        votes: set[str] = set()
        while len(self._open) > (0 if everything or "save" in votes else 1):
            votes |= self._book(self._open.pop(0))
        save = "save" in votes
        if self._progress.skipped_in_a_row >= self._limit:
            return Verdict(Outcome.NONFINITE, save)
        if "save_failed" in votes and self._failing:
            return Verdict(Outcome.FAILED, save)
        return Verdict(Outcome.STOPPED if "stop" in votes else None, save)

    def _book(self, entry: _Entry) -> frozenset[str]:
        agreed = entry.result.read()
        progress = self._progress
        progress.step = entry.step
        progress.updates += not agreed.skipped
        progress.tokens += agreed.tokens
        if not agreed.overflowed:  # an overflow is how fp16 finds its loss scale
            progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if agreed.skipped else 0
        progress.loss = agreed.loss if math.isfinite(agreed.loss) else None  # JSON knows no infinity
        if entry.val_loss is not None:
            progress.val_loss, progress.val_step = entry.val_loss, entry.step
        if self._observers is not None:
            scale = {"loss_scale": agreed.loss_scale} if self._scaled else {}
            self._observers.step(
                StepRecord(
                    step=entry.step,
                    updates=progress.updates,
                    loss=agreed.loss,
                    grad_norm=agreed.grad_norm,
                    lr=entry.lr,
                    tokens=progress.tokens,
                    tokens_per_second=agreed.tokens / max(entry.step_seconds, 1e-9),
                    step_seconds=entry.step_seconds,
                    data_seconds=entry.data_seconds,
                    skipped=agreed.skipped,
                    val_loss=entry.val_loss,
                    extra={**entry.extra, **scale},
                )
            )
        return agreed.votes
