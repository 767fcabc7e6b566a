"""The step log: results of steps as they arrive from the device, and the decisions that ranks take on them.

A result is read one step late, so that the host is always a step ahead of the device and never drains it. Only before
something that needs the numbers (a save, the end) is everything settled at once. All ranks read the same results at
the same steps, so they take the same decisions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stoker.conf.schema import Config
from stoker.parallel.update import ControlFlag, StepMetrics, StepResult
from stoker.trainer.report.observer import StepRecord
from stoker.trainer.report.observers import Observers
from stoker.trainer.report.routing import expert_tokens, routing_metrics
from stoker.trainer.runtime.outcome import Outcome, Superseded
from stoker.trainer.runtime.process import Phase, Phases, read_stamps
from stoker.trainer.runtime.requests import ending_of
from stoker.trainer.runtime.stragglers import STEPS, Stragglers
from stoker.trainer.spikes import ceilings
from stoker.trainer.utilisation import Arithmetic


@dataclass
class Progress:
    """The progress of a run. `step` numbers the global batches attempted, `updates` the optimizer steps taken."""

    step: int = 0
    updates: int = 0
    tokens: int = 0  # valid tokens of the steps so far
    skipped_in_a_row: int = 0
    empty: int = 0  # steps whose whole batch had no label
    empty_in_a_row: int = 0
    loss: float | None = None  # of the last step
    val_loss: float | None = None  # of the last evaluation
    val_step: int | None = None  # after which that was
    seen: list[list[float]] = field(
        default_factory=list
    )  # step, loss, norm of sound steps, for `stoker.trainer.spikes`
    missed_tasks: int | None = None  # after which step the tasks were due, where a request to end came first
    passed_over: list[list[int]] = field(default_factory=list)  # first and last step of spans found bad


@dataclass(frozen=True)
class Decision:
    """What all ranks do next: continue, save, or end with an outcome."""

    outcome: Outcome | None = None
    save: bool = False  # a checkpoint was requested; every result has been read for it
    bad_step: int | None = None  # return to a checkpoint before it, and pass it over


@dataclass(frozen=True)
class _Entry:
    step: int
    lr: float
    result: StepResult
    val_loss: float | None
    step_seconds: float
    data_seconds: float
    extra: Mapping[str, float]


class StepLog:
    """Records steps in `progress` and, on global rank 0, passes them to the observers."""

    def __init__(
        self,
        config: Config,
        progress: Progress,
        observers: Observers | None,
        phase: Phases,
        stragglers: Stragglers | None = None,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        self._stragglers, self._arithmetic = stragglers, arithmetic
        self._config, self._bad = config, config.nonfinite
        self._bad_step: int | None = None  # the first bad one
        self._seq_len = config.seq_len
        self._scaled = config.precision == "fp16"
        self._failing = config.checkpoint.on_error == "fail"
        self._progress, self._observers, self._phase = progress, observers, phase
        self._open: list[_Entry] = []
        self._named: set[str] = set()  # warnings given
        self._last_entry = time.perf_counter()

    def enter(
        self, step: int, lr: float, result: StepResult, val_loss: float | None, extra: Mapping[str, float]
    ) -> float:
        """A step has been handed to the device. `extra` are metrics of some steps only. Returns the step's seconds."""
        now = time.perf_counter()
        data_seconds = self._phase.take_seconds().get(Phase.DATA, 0.0)
        seconds, self._last_entry = now - self._last_entry, now
        self._open.append(_Entry(step, lr, result, val_loss, seconds, data_seconds, extra))
        return seconds

    def settle(self, *, everything: bool) -> Decision:
        """Read the results that are due: all but the newest, or all; all also when a save is requested.

        Raises, on all ranks at the same step, Superseded when another start of the run has begun, and ValueError when
        the first update has a gradient of exactly zero.
        """
        votes: set[ControlFlag] = set()
        while len(self._open) > (0 if everything or ControlFlag.SAVE in votes else 1):
            votes |= self._book(self._open.pop(0))
        save = ControlFlag.SAVE in votes
        if ControlFlag.SUPERSEDED in votes:
            raise Superseded
        if self._bad_step is not None:
            if self._bad.action == "stop":
                return Decision(Outcome.NONFINITE, save)
            if self._bad.action == "rollback":
                return Decision(bad_step=self._bad_step)
        if self._progress.skipped_in_a_row >= self._bad.limit:
            return Decision(Outcome.NONFINITE, save)
        if self._progress.empty_in_a_row >= self._bad.limit:
            return Decision(Outcome.FAILED, save)
        if ControlFlag.SAVE_FAILED in votes and self._failing:
            return Decision(Outcome.FAILED, save)
        return Decision(ending_of(frozenset(votes)), save)

    def _book(self, entry: _Entry) -> frozenset[ControlFlag]:
        agreed = entry.result.read()
        progress = self._progress
        progress.step = entry.step
        empty = agreed.tokens == 0
        self._warn_of(entry.step, agreed)
        progress.updates += not agreed.skipped
        progress.tokens += agreed.tokens
        progress.empty += empty
        progress.empty_in_a_row = progress.empty_in_a_row + 1 if empty else 0
        if not agreed.overflowed and not empty:  # an overflow is how fp16 finds its loss scale
            progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if agreed.skipped else 0
            if agreed.skipped and self._bad_step is None:
                self._bad_step = entry.step
        if self._bad.spike is not None and not agreed.skipped:
            progress.seen = [*progress.seen, [entry.step, agreed.loss, agreed.grad_norm]][-self._bad.window - 1 :]
        progress.loss = agreed.loss if math.isfinite(agreed.loss) else None  # JSON has no infinity
        if entry.val_loss is not None:
            progress.val_loss, progress.val_step = entry.val_loss, entry.step
        if self._observers is not None:
            if self._stragglers is not None:
                self._name_stragglers(entry.step, agreed.work_seconds)
            scale = {"loss_scale": agreed.loss_scale} if self._scaled else {}
            memory = _memory(agreed.memory_bytes)
            routing = routing_metrics(agreed.routed, self._config)
            every = self._config.log.expert_tokens_every
            counted = expert_tokens(agreed.routed, self._config) if every and entry.step % every == 0 else {}
            used = {} if self._arithmetic is None else self._arithmetic.metrics(entry.step_seconds)
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
                    empty=empty,
                    val_loss=entry.val_loss,
                    extra={**entry.extra, **scale, **memory, **used, **agreed.scalars, **routing},
                    expert_tokens=counted,
                )
            )
        return agreed.votes

    def _warn_of(self, step: int, agreed: StepMetrics) -> None:
        """Warn, once each, of conditions under which a run continues but does not train what it should."""
        if agreed.tokens == 0:
            self._warn(
                f"step {step}: no token of the batch is a label, so there is no update: are prompts longer "
                f"than seq_len={self._seq_len}, or is no turn trained on? `stoker data peek RUN --step {step}` shows it"
            )
        elif agreed.grad_norm == 0.0:
            what = (
                f"step {step}: the gradient norm is exactly 0: no trained parameter reaches the loss. Either a buffer "
                "or weight on the path is zero (rebuild_buffers must compute every buffer), or the loss is a constant"
            )
            if not self._progress.updates:
                raise ValueError(what)
            self._warn(what)
        if agreed.unequal_buffers:
            self._warn(
                f"step {step}: ranks computed different persistent buffers, each from its sequences; those of the "
                "first rank are kept, so that the run depends on the layout. Reduce them over the ranks in forward, "
                "or register them with persistent=False"
            )

    def _warn(self, text: str) -> None:
        kind = text.partition(": ")[2][:20]  # independent of the step
        if self._observers is not None and kind not in self._named:
            self._named.add(kind)
            self._observers.message(f"warning: {text}")

    def ceilings(self, step: int) -> tuple[float, float]:
        """The largest loss and gradient norm that `step` may have: equal on all ranks."""
        return ceilings(self._progress.seen, step, self._bad.spike, self._bad.window)

    def _name_stragglers(self, step: int, seconds: Sequence[float]) -> None:
        assert self._stragglers is not None and self._observers is not None
        for rank, factor in self._stragglers.book(seconds):
            stamp = read_stamps(self._phase.folder).get(rank)
            where = f"rank {rank}" + (f" on {stamp.host}" if stamp else "")
            self._observers.message(
                f"{where} is slow: {factor:.2f} times the median work of a rank, for {STEPS} steps up to step {step}"
            )


def _memory(of_ranks: Sequence[float]) -> dict[str, float]:
    """The most and the least that a rank has held so far, and which rank has held the most."""
    if not any(of_ranks):  # not known
        return {}
    most = max(of_ranks)
    rank = of_ranks.index(most)
    return {"memory_peak_bytes": int(most), "memory_peak_rank": rank, "memory_least_bytes": int(min(of_ranks))}
