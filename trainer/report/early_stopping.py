"""Early stopping, as an observer that the key `observers` names (docs/observing.md)."""

from __future__ import annotations

from typing import Any

from stoker.trainer.report.observer import Observer, StepRecord


class EarlyStopping(Observer):
    """Ends the run when a metric has not improved for some evaluations."""

    def __init__(self, metric: str = "val_loss", patience: int = 3, min_delta: float = 0.0) -> None:
        """`metric`: a number of metrics.jsonl, of which less is better. `patience`: how many of its values in a row may
        be no better than the best one by more than `min_delta`."""
        if patience < 1:
            raise ValueError(f"patience={patience}: it counts values, so it is at least 1")
        self._metric, self._patience, self._min_delta = metric, patience, min_delta
        self._best: float | None = None
        self._best_step = 0
        self._worse = 0  # values in a row that were not better

    def step(self, record: StepRecord) -> None:
        value = record.extra.get(self._metric, getattr(record, self._metric, None))
        if value is None:
            return
        if self._best is None or value < self._best - self._min_delta:
            self._best, self._best_step, self._worse = value, record.step, 0
        else:
            self._worse += 1

    def stop_reason(self) -> str | None:
        if self._worse < self._patience:
            return None
        return f"{self._metric} is no better than {self._best:.6g} of step {self._best_step} since {self._worse} values"

    def state(self) -> Any:
        return {"best": self._best, "best_step": self._best_step, "worse": self._worse}

    def load_state(self, state: Any) -> None:
        self._best, self._best_step, self._worse = state["best"], state["best_step"], state["worse"]
