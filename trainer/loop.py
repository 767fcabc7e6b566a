"""The loop: the table of contents of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from torch.profiler import record_function

from stoker.checkpoint import VALIDATION_LOSS, Checkpoints, SaveReport
from stoker.conf.schema import Config, to_dict
from stoker.data import RowSource
from stoker.parallel.batch import Batch
from stoker.parallel.engine import Engine
from stoker.parallel.mesh import Mesh
from stoker.parallel.shards import Shard
from stoker.parallel.tensor.low_rank import SLOT
from stoker.parallel.update import ControlFlag, StepFlags
from stoker.trainer.evaluation import AVERAGED, Evaluated, Evaluation
from stoker.trainer.facts import Facts
from stoker.trainer.frozen_base import STATE, FrozenBase
from stoker.trainer.memory import PeakMemory
from stoker.trainer.report.breakdown import CHECKPOINT
from stoker.trainer.report.goodput import Booking
from stoker.trainer.report.messages import StepMessages
from stoker.trainer.report.observers import Observers
from stoker.trainer.report.profile import Profiler
from stoker.trainer.runtime.faults import Faults
from stoker.trainer.runtime.garbage import Collections
from stoker.trainer.runtime.outcome import Outcome
from stoker.trainer.runtime.process import Phase, Phases
from stoker.trainer.runtime.requests import Requests, ending_of
from stoker.trainer.runtime.shutdown_estimate import CHECKPOINT_SECONDS
from stoker.trainer.runtime.stragglers import Stragglers, WorkClock
from stoker.trainer.runtime.timeouts import Timeouts
from stoker.trainer.schedule import evaluation_every, learning_rate, tasks_every
from stoker.trainer.step_log import Progress, StepLog
from stoker.trainer.utilisation import Arithmetic

log = logging.getLogger(__name__)


class Tasks(Protocol):
    """What runs between steps: `stoker.trainer.tasks`."""

    def metrics(self, trainer: Trainer, step: int, given_up: Callable[[], bool]) -> dict[str, float] | None: ...


@dataclass
class Trainer:
    """One rank's part of a training run. `stoker.trainer.assemble` puts one together from a config."""

    config: Config
    facts: Facts
    mesh: Mesh
    engine: Engine
    rows: RowSource
    evaluation: Evaluation
    checkpoints: Checkpoints
    observers: Observers | None  # on global rank 0
    requests: Requests
    phase: Phases
    profiler: Profiler
    faults: Faults
    timeouts: Timeouts
    restore: Callable[[], dict[str, Any] | None]  # load the newest checkpoint, all ranks together; its state
    base: FrozenBase | None = None  # of an adapter run: what its checkpoints leave out
    tasks: Tasks | None = None  # of `eval.tasks`
    arithmetic: Arithmetic | None = None  # of a step, on global rank 0, where the devices' peak is known
    messages: StepMessages = field(default_factory=StepMessages)  # counts those of one step, on global rank 0
    progress: Progress = field(default_factory=Progress, init=False)
    booking: Booking | None = field(default=None, init=False)  # on global rank 0, once training
    failed_save: str | None = field(default=None, init=False)  # why a save failed, as this rank knows it
    saved: dict[str, float] = field(default_factory=dict, init=False)  # metrics of the save that ended in this step
    finished_by: str | None = field(default=None, init=False)  # why an observer ends the run, on global rank 0
    _step: int = field(default=0, init=False)  # the last one begun
    _stragglers: Stragglers = field(default_factory=Stragglers, init=False)
    _seen_gradients: bool = field(default=False, init=False)  # were parameters without a gradient looked for?
    _stop_reported: bool = field(default=False, init=False)  # was the stop reported on the screen?
    _failing: bool = field(default=False, init=False)  # has a save failed that the other ranks do not know of?
    # a request to end during an evaluation, which was skipped
    _given_up: Outcome | None = field(default=None, init=False)

    def fit(self) -> Outcome:
        """Train until the last step, the end of the data, or a decision of all ranks. The state is saved at the end."""
        step_log = self.step_log()
        clock, memory, collections = WorkClock(), PeakMemory(self.mesh.device), Collections()
        outcome = Outcome.COMPLETED
        last = self._is_last(self.progress.step)
        if last and self.observers is not None:
            self.observers.message(self._nothing_to_do())
        late = self._missed_tasks(last)
        outcome = self._given_up or outcome
        ended = any(self.mesh.any([self._asked_to_finish() is not None]))  # by an observer, before it was resumed
        for step in () if ended or self._given_up is not None else self.steps(self.config.steps):
            with self.profiler.step(step) as profiled:
                self.phase(step, Phase.DATA)
                with record_function("stoker.data"):
                    first_row = self.rows.row
                    rows = self.rows.next()
                self.phase(step, Phase.FORWARD_BACKWARD)
                self.faults.inject(step)
                with self.faults.in_passes(), self.messages.of(step):
                    self.engine.forward_backward(rows, first_row)
                if not self._seen_gradients:
                    self._look_at_gradients(step, rows)
                self.phase(step, Phase.AWAIT_STAGED)
                with record_function(CHECKPOINT):
                    self.checkpoints.await_staged()  # a snapshot in flight must not see the update
                self.phase(step, Phase.UPDATE)
                lr = learning_rate(self.config.schedule, self.config.optim, step)
                work_seconds = max(clock.take(), self.engine.gpu_seconds()) + self.phase.spent(Phase.DATA)
                flags = StepFlags(self._votes(), work_seconds, *step_log.ceilings(step), memory_bytes=memory.bytes())
                with self.messages.of(step, len(rows)):
                    result = self.engine.update(lr, flags)  # stays on the device
            self.phase(step, Phase.DATA)  # whether this was the last step may be known only when the next rows are
            last = self._is_last(step)
            found = self._evaluate(step, last)
            losses = {} if found is None else found.extra
            answers, late = {**late, **self._run_tasks(step, last)}, {}
            extra = {"first_row": first_row, **profiled, **self.rows.metrics(), **self.saved, **losses, **answers}
            seconds = step_log.enter(step, lr, result, None if found is None else found.val_loss, extra)
            self.timeouts.after_step(seconds, self.mesh)
            saving = self._saves_at(step)
            if self.booking is not None:
                self.booking.step()
            settled = saving or last or self._given_up is not None
            verdict = step_log.settle(everything=settled)  # else one step late, so that the host never waits
            if ending := verdict.outcome or self._given_up:
                outcome = ending
                break
            if verdict.bad_step is not None:
                if not self._roll_back(verdict.bad_step):
                    outcome = Outcome.NONFINITE
                    break
                step_log = self.step_log()
                continue
            if saving or verdict.save:
                self.save()
            self.report_saves()
            collections.after(step)
        self.profiler.close()
        collections.close()
        step_log.settle(everything=True)
        self.save()
        asked = outcome in (Outcome.STOPPED, Outcome.PREEMPTED)
        return Outcome.COMPLETED if asked and last else outcome

    def _nothing_to_do(self) -> str:
        done, wanted = self.progress.step, self.config.steps
        what = (
            f"steps={wanted} is below the {done} that are done" if wanted < done else f"step {done} of {wanted} is done"
        )
        goes_on = "the data end" if self.rows.exhausted else f"set steps above {done} to continue"
        return f"nothing to do: {what}; {goes_on}"

    def save(self) -> None:
        """Start saving the state after the last step done; metrics up to it are on disk before it can be committed."""
        step = self.progress.step
        if self.booking is not None:
            self.booking.saving(step)
        self.phase(step, Phase.SAVE)
        self.requests.saving()
        flush = None
        if self.observers is not None:
            flush = self.observers.metrics.flush
            self.observers.saving(step)
        with record_function(CHECKPOINT):
            self.checkpoints.save(step, self.saved_shards(), self.state(), before_commit=flush)

    def saved_shards(self) -> list[Shard]:
        """What a checkpoint holds of this rank."""
        shards = self.engine.shards()
        return shards if self.base is None else self.base.saved(shards)

    def report_saves(self) -> None:
        """Report saves that ended to the observers, and flag those that failed to the other ranks."""
        self.saved = {}
        for report in self.checkpoints.finished():
            self.saved = save_metrics(report)
            if report.error is not None:
                self._failed(f"checkpoint of step {report.step} failed: {report.error}")
            if self.observers is not None:
                self.observers.checkpoint(report)
        for upload in self.checkpoints.uploads():
            if upload.error is not None:
                self._failed(f"upload of step {upload.step} failed: {upload.error}")
            elif self.observers is not None:
                self.observers.message(f"uploaded step {upload.step} in {upload.seconds:.1f} s")

    def _failed(self, what: str) -> None:
        """Record a failure and flag it to all ranks with the next step; `checkpoint.on_error` decides what follows."""
        self.failed_save, self._failing = what, True
        log.error(what)

    def state(self) -> dict[str, Any]:
        """Everything that is not a tensor: loadable by any layout, and but for the observers' equal on every rank.

        Rank 0's is stored.
        """
        return {
            "progress": asdict(self.progress),
            "engine": self.engine.state(),
            "data": self.rows.state(),
            "layout": str(self.mesh.layout),
            "loss": self.progress.loss,
            VALIDATION_LOSS: self.progress.val_loss if self.progress.val_step == self.progress.step else None,
            "config": to_dict(self.config),
            **({} if self.base is None else {STATE: self.base.digests}),
            **({"observers": kept} if self.observers is not None and (kept := self.observers.state()) else {}),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. Raises ValueError when the data, or the base of an adapter, are not the state's."""
        if self.base is not None:
            self.base.refuse_other(state.get(STATE, {}))
        self.rows.load_state(state["data"])
        self.engine.load_state(state["engine"])
        self.engine.shards_written()
        self.progress = Progress(**state["progress"])
        if self.observers is not None:
            self.observers.load_state(state.get("observers"))
            self.finished_by = None

    def steps(self, last: int) -> Iterator[int]:
        """The steps to train, to `last` or to the end of the data: those of `skip_steps` and those found bad are passed
        over, with their rows."""
        self._step = self.progress.step
        while self._step < last:
            self._step += 1
            spans = self.config.skip_steps + self.progress.passed_over
            if any(first <= self._step <= end for first, end in spans):
                continue
            self.rows.pass_over(self._step)
            if self.rows.exhausted:
                return
            yield self._step

    def step_log(self) -> StepLog:
        """A step log over the present progress, with nothing open."""
        return StepLog(self.config, self.progress, self.observers, self.phase, self._stragglers, self.arithmetic)

    def _roll_back(self, bad_step: int) -> bool:
        """Return to the newest checkpoint, to continue from there without `bad_step`; False where that is not possible.

        A run that is killed before the next checkpoint comes here again, because it computes the same numbers.
        """
        spans = [*self.progress.passed_over, [bad_step, bad_step]]
        if len(spans) > self.config.nonfinite.limit:
            return False
        self.phase(self.progress.step, Phase.ROLLBACK)
        self.checkpoints.wait()
        self.report_saves()
        state = self.restore()
        if state is None:
            return False
        self.load_state(state)
        self.progress.passed_over = spans
        self._step = self.progress.step
        if self.booking is not None:
            self.booking.rolled_back(self._step)
        if self.observers is not None:
            self.observers.rolled_back(self._step)
            self.observers.message(f"step {bad_step} is bad: back to step {self._step}, to continue without its rows")
        return True

    def _look_at_gradients(self, step: int, batch: Batch) -> None:
        """In the first step that has labels: warn of the parameters whose gradient is exactly zero."""
        self._seen_gradients = self.progress.updates > 0
        if self._seen_gradients or not any(self.mesh.any([bool(batch.valid_tokens() > 0)])):
            return
        self._seen_gradients = True
        # The first matrix of an adapter has none until the second one, which begins at zero, has moved.
        names = [name for name in self.engine.without_gradient() if not name.endswith(f".{SLOT}.A")]
        if names and self.observers is not None:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            self.observers.message(
                f"warning: step {step}: the gradient of {', '.join(names[:5])}{more} is exactly zero: does forward use "
                "them, and does their output reach the loss? Freeze parameters that are not to be trained "
                "(requires_grad_(False))"
            )

    def _votes(self) -> frozenset[ControlFlag]:
        votes = self.requests.votes()
        if ending_of(votes) and self.observers is not None and not self._stop_reported:
            self._stop_reported = True
            self.observers.message(f"ending on {self.requests.why()}: saving first (Ctrl-C again kills)")
        if self.observers is not None and (waiting := self.observers.metrics.failure) is not None:
            self.failed_save, self._failing = waiting, True
        if self._failing:
            self._failing = False
            votes |= {ControlFlag.SAVE_FAILED}
        if self._asked_to_finish() is not None:
            votes |= {ControlFlag.FINISH}
        if self.observers is not None and self.observers.wants_save():
            votes |= {ControlFlag.SAVE}
        return votes

    def _asked_to_finish(self) -> str | None:
        """Why an observer of the user's ends the run, on global rank 0."""
        if self.observers is not None and self.finished_by is None:
            self.finished_by = self.observers.stop_reason()
            if self.finished_by is not None:
                self.observers.message(f"the run ends: {self.finished_by}")
        return self.finished_by

    def _saves_at(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return every > 0 and step % every == 0

    def _is_last(self, step: int) -> bool:
        """Whether no step follows `step`: equal on all ranks."""
        return step >= self.config.steps or self.rows.exhausted

    def _evaluate(self, step: int, last: bool) -> Evaluated | None:
        every = evaluation_every(self.config)
        if not self.evaluation.parts or not (last or (every > 0 and step % every == 0)):
            return None
        self.phase(step, Phase.EVALUATE)
        gives_up = self._ends_anyway if last else self._gives_up
        found = self.evaluation.losses(self.engine, gives_up)
        if found is None or self.config.optim.ema is None:
            return found
        self.checkpoints.await_staged()  # a snapshot in flight must not see the average
        with self.engine.averaged():
            averaged = self.evaluation.losses(self.engine, gives_up)
        return None if averaged is None else replace(found, extra={**found.extra, AVERAGED: averaged.val_loss})

    def _tasks_due(self, step: int, last: bool) -> bool:
        every = tasks_every(self.config)
        return self.tasks is not None and (last or (every > 0 and step % every == 0))

    def _run_tasks(self, step: int, last: bool) -> dict[str, float]:
        """The results of the tasks that are due after `step`, as metrics."""
        return self._answers(step, self._ends_anyway if last else self._gives_up) if self._tasks_due(step, last) else {}

    def _answers(self, step: int, given_up: Callable[[], bool]) -> dict[str, float]:
        """Those of the tasks after `step`. That a request to end kept them from being run is noted in `progress`."""
        assert self.tasks is not None
        found = None
        if self._given_up is None:
            self.phase(step, Phase.EVALUATE)
            found = self.tasks.metrics(self, step, given_up)
        self.progress.missed_tasks = step if found is None else None
        return found or {}

    def _missed_tasks(self, last: bool) -> dict[str, float]:
        """What was due after the step that the run resumes from; it stands in the line of the next step, if that has
        none of its own."""
        step = self.progress.step
        missed, self.progress.missed_tasks = self.progress.missed_tasks == step, None
        if self.tasks is None or not missed or last or self._tasks_due(step + 1, last=False):
            return {}
        return self._answers(step, self._gives_up)

    def _ends_anyway(self) -> bool:
        return False

    def _gives_up(self) -> bool:
        """Whether any rank has a request to end; equal on all ranks. A collective."""
        votes = self.requests.votes()
        agreed = self.mesh.any([flag in votes for flag in ControlFlag])
        self._given_up = ending_of(frozenset(flag for flag, cast in zip(ControlFlag, agreed, strict=True) if cast))
        return self._given_up is not None


def save_metrics(report: SaveReport) -> dict[str, float]:
    """The metrics of a save in metrics.jsonl, on the line of the step after which its end was seen."""
    if report.error is not None:
        return {"checkpoint_step": report.step, "checkpoint_failed": 1}
    return {
        "checkpoint_step": report.step,
        CHECKPOINT_SECONDS: report.seconds,
        "checkpoint_stall_seconds": report.stall_seconds,
        "checkpoint_staged_bytes": report.staged_bytes,
        "checkpoint_write_bytes_per_second": report.write_bytes_per_second,
        "checkpoint_commit_seconds": report.commit_seconds,
    }
