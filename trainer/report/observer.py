"""The events of a run that an observer may see, and the records that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from stoker.conf.schema import Config


@dataclass(frozen=True)
class StepRecord:
    """One step as it is shown and stored. A loss or norm that is not finite is passed as it is (nan, inf)."""

    step: int  # global batches attempted
    updates: int  # optimizer steps taken
    loss: float | None  # nats per valid token, or per what the objective counts
    grad_norm: float | None  # before clipping
    lr: float
    tokens: int  # valid tokens trained so far
    tokens_per_second: float
    step_seconds: float  # wall time since the step before
    data_seconds: float  # of which waiting for rows
    skipped: bool = False  # no update: the loss or the norm was not finite, or the batch had no label
    empty: bool = False  # skipped as no token of the batch was a label; its loss is nan
    val_loss: float | None = None  # nats per valid token, at the steps that evaluate
    extra: Mapping[str, float] = field(default_factory=dict)  # more numbers for metrics.jsonl and trackers
    expert_tokens: Mapping[int, list[int]] = field(default_factory=dict)  # of each expert by layer, at some steps


class CheckpointReport(Protocol):
    """The fields of a finished save that observers read."""

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
    """Receives the events of a run. Every event is optional."""

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
        """The run has gone back to `step`: the events after it will come again."""

    def message(self, text: str) -> None:
        """One line for the screen."""

    def finish(self, outcome: str, step: int) -> None:
        """The run ends here, at `step`; no event follows. Returns within seconds."""

    # What follows is asked of the observers of the key `observers` only.

    def stop_reason(self) -> str | None:
        """Asked after every step: why the run should save and end now; None to go on."""
        return None

    def wants_save(self) -> bool:
        """Asked after every step: should a checkpoint be saved?"""
        return False

    def state(self) -> Any:
        """What is kept in checkpoints: values that JSON has, up to the last step that was passed to `step`."""
        return None

    def load_state(self, state: Any) -> None:
        """The inverse of `state`, before `start` and after a rollback."""
