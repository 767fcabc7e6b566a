"""The loop: the table of contents of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch.profiler import record_function

from checkpoint import Checkpoints
from conf.schema import Config, to_dict
from data import RowStream
from parallel.engine import Engine
from parallel.mesh import Mesh
from trainer.evaluation import Evaluation
from trainer.ledger import Ledger, Progress
from trainer.observers import Observers
from trainer.outcome import Outcome
from trainer.process import Phases, Requests
from trainer.profile import Profiler
from trainer.schedule import learning_rate


@dataclass
class Trainer:
    """One rank's part of a training run. `trainer.assemble` puts one together from a config."""

    config: Config
    mesh: Mesh
    engine: Engine
    rows: RowStream
    evaluation: Evaluation
    checkpoints: Checkpoints
    observers: Observers | None  # on global rank 0
    requests: Requests
    phase: Phases
    profiler: Profiler
    progress: Progress
    _told: bool = field(default=False, init=False)  # has the person who watches been told that we stop?

    def fit(self) -> Outcome:
        """Train until the last step, the end of the data, or a verdict of all ranks. The state is saved at the end."""
        ledger = Ledger(self.config, self.progress, self.observers, self.phase)
        outcome = Outcome.COMPLETED
        last = min(self.config.steps, self.progress.step + self.rows.batches_left)
        if self.progress.step >= last and self.observers is not None:
            self.observers.message(f"nothing to do: step {self.progress.step} of {last} is done; steps=... goes on")
        for step in range(self.progress.step + 1, last + 1):
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
            val_loss = self._evaluate(step, last)
            ledger.enter(step, lr, result, val_loss, profiled)
            saving = self._saves_at(step)
            verdict = ledger.settle(everything=saving or step == last)  # else one step late: the host never waits
            if verdict.outcome is not None:
                outcome = verdict.outcome
                break
            if saving:
                self.save()
            self.report_saves()
        self.profiler.close()
        ledger.settle(everything=True)
        self.save()
        return Outcome.COMPLETED if outcome is Outcome.STOPPED and self.progress.step == last else outcome

    def save(self) -> None:
        """Start saving the state after the last step done; metrics up to it are on disk before it can be committed."""
        step = self.progress.step
        self.phase(step, "save")
        if self.observers is not None:
            self.observers.metrics.flush()
            self.observers.saving(step)
        self.checkpoints.save(step, self.engine.shards(), self.state())

    def report_saves(self) -> None:
        """Tell the observers of the saves that ended."""
        for report in self.checkpoints.finished():
            if self.observers is not None:
                self.observers.checkpoint(report)

    def state(self) -> dict[str, Any]:
        """Everything that is not a tensor: equal on every rank and loadable by any layout."""
        return {
            "progress": asdict(self.progress),
            "engine": self.engine.state(),
            "data": self.rows.state(),
            "layout": str(self.mesh.layout),
            "loss": self.progress.loss,
            "config": to_dict(self.config),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. Raises ValueError when the data are not those the state speaks of."""
        self.rows.load_state(state["data"])
        self.engine.load_state(state["engine"])
        self.engine.shards_written()
        self.progress = Progress(**state["progress"])

    def _votes(self) -> frozenset[str]:
        votes = self.requests.votes()
        if votes and self.observers is not None and not self._told:
            self._told = True
            self.observers.message("asked to stop: saving, then ending (Ctrl-C again kills)")
        return votes

    def _saves_at(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return every > 0 and step % every == 0

    def _evaluate(self, step: int, last: int) -> float | None:
        every = self.config.eval.every
        if not self.evaluation.rows or not (step == last or (every > 0 and step % every == 0)):
            return None
        self.phase(step, "evaluate")
        return self.evaluation.loss(self.engine)
