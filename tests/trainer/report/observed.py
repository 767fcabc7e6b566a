"""What the tests of the observers share: a run directory, records and reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.trainer.report.observer import StepRecord


@dataclass(frozen=True)
class Report:
    step: int
    seconds: float = 0.42
    bytes: int = 39_812_344
    error: str | None = None
    stall_seconds: float = 0.003
    write_bytes_per_second: float = 310e6


def record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "updates": step,
        "loss": 3.0 / step,
        "grad_norm": 0.81,
        "lr": 1e-3,
        "tokens": step * 1000,
        "tokens_per_second": 2000.0,
        "step_seconds": 0.5,
        "data_seconds": 0.05,
    }
    return StepRecord(step=step, **(values | changes))


def a_config(steps: int = 200, **tracker: Any) -> Config:
    config = Config()
    config.steps = steps
    for key, value in tracker.items():
        setattr(config.tracker, key, value)
    return config


def a_run(path: Path) -> RunDirectory:
    path.mkdir(exist_ok=True)
    return RunDirectory(path)
