"""Plan against measured: the record of a plan in a run, `attempts/K/plan.json`, and what that attempt measured."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stoker.conf.durable import write_whole
from stoker.conf.records import read_record
from stoker.conf.rundir import RunDirectory
from stoker.conf.values import ConfigError
from stoker.trainer.report.summary import Sample
from stoker.trainer.report.task_results import has_tasks
from stoker.trainer.runtime.outcome import Beginning, read_beginning

MEDIANS = ("step_seconds", "tokens_per_second", "tflops", "mfu")
WARMING = 2  # steps after a start that are left out of medians: compilation, and malloc's first blocks


@dataclass(frozen=True)
class Predicted:
    """Figures of a plan that a run measures too, in the units of metrics.jsonl. None: not known of the device."""

    kind: str  # cpu | cuda
    layout: str
    ranks: int
    device: str | None
    worst_rank: int
    counted_bytes: int  # live at the peak of the worst rank
    memory_peak_bytes: int  # what a run measures at most: with the holes of the allocator, on CPUs also the program
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    messages: list[dict[str, Any]] | None = None  # of a step of rank 0, as in `stoker.trainer.report.messages`


def keep(run: RunDirectory, attempt: int, predicted: Predicted) -> None:
    """Write the record. Raises OSError naming the file."""
    write_whole(run.plan(attempt), (json.dumps(dataclasses.asdict(predicted), allow_nan=False) + "\n").encode())


def read_predicted(run: RunDirectory, attempt: int) -> Predicted | None:
    """The record of an attempt, None where it has none. Raises ValueError for a damaged one."""
    try:
        return read_record(run.plan(attempt), Predicted, "a plan")
    except FileNotFoundError:
        return None


def newest_attempt(run: RunDirectory) -> tuple[int, Beginning]:
    """The newest attempt that has begun. Raises ConfigError where there is none."""
    for number in reversed(run.attempt_numbers()):
        beginning = read_beginning(run, number)
        if beginning is not None:
            return number, beginning
    raise ConfigError(f"{run.path} has no attempt that began to train")


class Measured:
    """Of the steps after `since`: medians, and the memory of the newest."""

    def __init__(self, since: int) -> None:
        self._after = since + WARMING
        self._since = since
        self._samples = {name: Sample[float]() for name in MEDIANS}
        self.memory: float | None = None

    def add(self, step: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if step["step"] <= self._since:
            return
        if isinstance(step.get("memory_peak_bytes"), int | float):
            self.memory = step["memory_peak_bytes"]
        if step["step"] <= self._after or step.get("val_loss") is not None or has_tasks(step):
            return
        for name, sample in self._samples.items():
            if isinstance(step.get(name), int | float):
                sample.add(step[name])

    def value(self, name: str) -> float | None:
        """The figure of this name, None where no step has it."""
        if name == "memory_peak_bytes":
            return self.memory
        items = self._samples[name].items
        return statistics.median(items) if items else None


def beside(predicted: Predicted, measured: Measured) -> list[dict[str, Any]]:
    """Rows of name, predicted, measured and their ratio; figures that neither has are left out."""
    rows = []
    for name in ("memory_peak_bytes", *MEDIANS):
        expected, seen = getattr(predicted, name), measured.value(name)
        if expected is None and seen is None:
            continue
        ratio = seen / expected if expected and seen is not None else None
        rows.append({"name": name, "predicted": expected, "measured": seen, "ratio": ratio})
    return rows


TITLES = {
    "memory_peak_bytes": "memory of the worst rank",
    "step_seconds": "step",
    "tokens_per_second": "tokens/s",
    "tflops": "TFLOP/s of a device",
    "mfu": "MFU",
}


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of `beside` as text: what, predicted, measured, measured of predicted."""
    shown = [_shown(row["name"], row[column]) for column in ("predicted", "measured")]
    return [TITLES[row["name"]], *shown, "" if row["ratio"] is None else f"{row['ratio']:.0%}"]


COLUMNS = ("what", "predicted", "measured", "of predicted")


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "not known"
    if name == "memory_peak_bytes":
        return f"{value / 2**20:,.0f} MiB" if value < 8 * 2**30 else f"{value / 2**30:,.1f} GiB"
    if name == "step_seconds":
        return f"{value * 1000:,.0f} ms" if value < 1 else f"{value:,.2f} s"
    return f"{value:.1%}" if name == "mfu" else f"{value:,.1f}"
