"""metrics.jsonl: one JSON object per step, written by global rank 0, and how it is read back.

Every line is handed to the operating system at once, so that a killed process loses at most the line it was writing.
Floats are written by `repr`, so that equal text means bitwise equal numbers. JSON knows neither nan nor infinity: such
a number is written as null, and the line lists its key under "nonfinite".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stoker.conf.durable import sync_directory, write_durably
from stoker.conf.schema import Config
from stoker.trainer.report.observer import Observer, StepRecord

_RECENT_BYTES = 4 << 20  # some ten thousand steps
_encode = json.JSONEncoder(allow_nan=False).encode


class MetricsFile(Observer):
    """Appends to `path`. Raises OSError when the disk does: the file is part of the run."""

    name = "metrics.jsonl"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def start(self, config: Config, resumed_from_step: int | None, total_steps: int, facts: Mapping[str, str]) -> None:
        cut_back(self.path, resumed_from_step or 0)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sync_directory(self.path.parent)

    def rolled_back(self, step: int) -> None:
        assert self._file is not None, "rolled back before start"
        os.close(self._file)
        cut_back(self.path, step)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def step(self, record: StepRecord) -> None:
        assert self._file is not None, "step before start"
        line = (_encode(as_dict(record)) + "\n").encode()
        while line:  # a nearly full disk takes part of a line, and refuses the rest
            line = line[os.write(self._file, line) :]

    def flush(self, sync: bool = True) -> None:
        """With `sync`, return once every step so far is on the disk: before a checkpoint that has them commits."""
        if sync and self._file is not None:
            os.fsync(self._file)

    def finish(self, outcome: str, step: int) -> None:
        if self._file is not None:
            self.flush()
            os.close(self._file)
            self._file = None


def as_dict(record: StepRecord) -> dict[str, Any]:
    """`record` as the JSON object of its line."""
    values: dict[str, Any] = {
        "step": record.step,
        "updates": record.updates,
        "loss": record.loss,
        "grad_norm": record.grad_norm,
        "lr": record.lr,
        "tokens": record.tokens,
        "tokens_per_second": record.tokens_per_second,
        "step_seconds": record.step_seconds,
        "data_seconds": record.data_seconds,
        "skipped": record.skipped,
    }
    if record.val_loss is not None:
        values["val_loss"] = record.val_loss
    for key, value in record.extra.items():
        assert key not in values, f"extra metric {key!r} has the name of a metric of every step"
        values[key] = value
    nonfinite = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    if nonfinite:
        values |= dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
    return values


def read(path: Path) -> list[dict[str, Any]]:
    """The steps in the file, in order. A line torn by a kill is left out; no file means no steps."""
    return [step for _, step in _lines(path)]


def read_recent(path: Path) -> list[dict[str, Any]]:
    """As `read`, but no more than the last of them: as quick after a million steps as after ten thousand."""
    return [step for _, step in _lines(path, _RECENT_BYTES)]


def cut_back(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step` and drop the rest, torn lines too, atomically."""
    if not path.exists():
        return
    kept = b"".join(line for line, values in _lines(path) if values["step"] <= step)
    if len(kept) == path.stat().st_size:
        return
    write_durably(path, kept)
    sync_directory(path.parent)


def _lines(path: Path, most_bytes: int | None = None) -> list[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return []
    with open(path, "rb") as file:
        if most_bytes is not None:
            file.seek(-min(most_bytes, path.stat().st_size), os.SEEK_END)
        lines = file.read().splitlines(keepends=True)
    found = []
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append((line, values))
    return found
