"""The loop: the table of contents of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.profiler import record_function

from checkpoint import VALIDATION_LOSS, Checkpoints, SaveReport
from conf.schema import Config, to_dict
from data import RowSource
from parallel.engine import Engine
from parallel.mesh import Mesh
from trainer.evaluation import Evaluation
from trainer.ledger import Ledger, Progress
from trainer.observers import Observers
from trainer.outcome import Outcome
from trainer.process import Phases, Requests
from trainer.profile import Profiler
from trainer.schedule import learning_rate

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """One rank's part of a training run. `trainer.assemble` puts one together from a config."""

    config: Config
    mesh: Mesh
    engine: Engine
    rows: RowSource
    evaluation: Evaluation
    checkpoints: Checkpoints
    observers: Observers | None  # on global rank 0
    requests: Requests
    phase: Phases
    profiler: Profiler
    progress: Progress
    failed_save: str | None = field(default=None, init=False)  # why a save failed, as this rank knows it
    _told: bool = field(default=False, init=False)  # has the person who watches been told that we stop?
    _failing: bool = field(default=False, init=False)  # has a save failed that the other ranks must hear of?
    _saved: dict[str, float] = field(default_factory=dict, init=False)  # metrics of saves that ended in this step

    def fit(self) -> Outcome:
        """Train until the last step, the end of the data, or a verdict of all ranks. The state is saved at the end."""
        ledger = Ledger(self.config, self.progress, self.observers, self.phase)
        outcome = Outcome.COMPLETED
        last = self._is_last(self.progress.step)
        if last and self.observers is not None:
            step, ends = self.progress.step, "the data end" if self.rows.exhausted else "steps=... goes on"
            self.observers.message(f"nothing to do: step {step} of {self.config.steps} is done; {ends}")
        for step in self._steps():
            with self.profiler.step(step) as profiled:
                self.phase(step, "data")
                with record_function("stoker.data"):
                    rows = self.rows.next()
                self.phase(step, "forward_backward")
                self.engine.forward_backward(rows)
                self.phase(step, "await_staged")
                self.checkpoints.await_staged()  # a snapshot in flight must not see the update
                self.phase(step, "update")
                lr = learning_rate(self.config.schedule, self.config.optim, step)
                result = self.engine.update(lr, self._votes())  # stays on the device
            self.phase(step, "data")  # whether this was the last step may be known only when the next rows are
            last = self._is_last(step)
            val_loss = self._evaluate(step, last)
            ledger.enter(step, lr, result, val_loss, {**profiled, **self.rows.metrics(), **self._saved})
            saving = self._saves_at(step)
            verdict = ledger.settle(everything=saving or last)  # else one step late: the host never waits
            if verdict.outcome is not None:
                outcome = verdict.outcome
                break
            if saving or verdict.save:
                self.save()
            self.report_saves()
        self.profiler.close()
        ledger.settle(everything=True)
        self.save()
        return Outcome.COMPLETED if outcome is Outcome.STOPPED and last else outcome

    def save(self) -> None:
        """Start saving the state after the last step done; metrics up to it are on disk before it can be committed."""
        step = self.progress.step
        self.phase(step, "save")
        self.requests.saving()
        if self.observers is not None:
            self.observers.metrics.flush()
            self.observers.saving(step)
        self.checkpoints.save(step, self.engine.shards(), self.state())

    def report_saves(self) -> None:
        """Tell the observers of the saves that ended, and the other ranks of those that failed."""
        self._saved = {}
        for report in self.checkpoints.finished():
            self._saved = save_metrics(report)
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
        """Remember a failure and have all ranks hear of it with the next step; `checkpoint.on_error` says what then."""
        self.failed_save, self._failing = what, True
        log.error(what)

    def state(self) -> dict[str, Any]:
        """Everything that is not a tensor: equal on every rank and loadable by any layout."""
        return {
            "progress": asdict(self.progress),
            "engine": self.engine.state(),
            "data": self.rows.state(),
            "layout": str(self.mesh.layout),
            "loss": self.progress.loss,
            VALIDATION_LOSS: self.progress.val_loss if self.progress.val_step == self.progress.step else None,
            "config": to_dict(self.config),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. Raises ValueError when the data are not those the state speaks of."""
        self.rows.load_state(state["data"])
        self.engine.load_state(state["engine"])
        self.engine.shards_written()
        self.progress = Progress(**state["progress"])

    def _steps(self) -> Iterator[int]:
        """The steps to train, to the last or to the end of the data: those of `skip_steps` are passed over, with their
        rows."""
        spans = self.config.skip_steps
        for step in range(self.progress.step + 1, self.config.steps + 1):
            if any(first <= step <= end for first, end in spans):
                continue
            self.rows.pass_over(step)
            if self.rows.exhausted:
                return
            yield step

    def _votes(self) -> frozenset[str]:
        votes = self.requests.votes()
        if "stop" in votes and self.observers is not None and not self._told:
            self._told = True
            self.observers.message("asked to stop: saving, then ending (Ctrl-C again kills)")
        if self._failing:
            self._failing = False
            votes |= {"save_failed"}
        return votes

    def _saves_at(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return every > 0 and step % every == 0

    def _is_last(self, step: int) -> bool:
        """Whether no step follows `step`: equal on all ranks."""
        return step >= self.config.steps or self.rows.exhausted

    def _evaluate(self, step: int, last: bool) -> float | None:
        every = self.config.eval.every
        if not self.evaluation.rows or not (last or (every > 0 and step % every == 0)):
            return None
        self.phase(step, "evaluate")
        return self.evaluation.loss(self.engine)


def save_metrics(report: SaveReport) -> dict[str, float]:
    """What metrics.jsonl says of a save, on the line of the step after which it was known to have ended."""
    if report.error is not None:
        return {"checkpoint_step": report.step, "checkpoint_failed": 1}
    return {
        "checkpoint_step": report.step,
        "checkpoint_stall_seconds": report.stall_seconds,
        "checkpoint_staged_bytes": report.staged_bytes,
        "checkpoint_write_bytes_per_second": report.write_bytes_per_second,
        "checkpoint_commit_seconds": report.commit_seconds,
    }
