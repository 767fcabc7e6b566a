"""Run directories of any length, written without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from stoker.conf.rundir import RunDirectory, write_config
from stoker.conf.schema import Config
from stoker.trainer.report.goodput import BOOKS
from stoker.trainer.runtime.outcome import Beginning, Ending, Outcome, write_beginning, write_ending

BEGAN = 1_700_000_000.0
SECONDS = {"startup": 12.0, "training": 300.0, "data": 20.0, "checkpoint": 8.0, "evaluation": 10.0}


def a_run(
    path: Path,
    steps: int = 60,
    attempts: int = 3,
    host: str = "node-1",
    message: str = "rank 1 was killed by SIGKILL",
    source: str = "library",
    lr: float = 1e-3,
    name: str | None = None,
) -> RunDirectory:
    """A run that was killed at equal distances, each time resumed from a checkpoint some steps back, and completed."""
    run = RunDirectory(path)
    path.mkdir(parents=True)
    config = Config()
    config.run.name, config.run.dir, config.steps, config.optim.lr = name or path.name, str(path), steps, lr
    write_config(run, config)
    with open(run.metrics, "w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(a_step(step, steps, source, lr)) + "\n")
    each, at = steps // attempts, BEGAN
    for number in range(1, attempts + 1):
        last = number == attempts
        run.attempt(number).mkdir(parents=True)
        begin, end = max(0, (number - 1) * each - 2), steps if last else number * each
        write_beginning(run, number, Beginning(at, begin, 2, host))
        until = at + sum(SECONDS.values())
        marks = [(end - 2, {name: 0.9 * seconds for name, seconds in SECONDS.items()})]
        moments = [
            (at + part * sum(SECONDS.values()), {name: part * seconds for name, seconds in SECONDS.items()})
            for part in (0.25, 0.5, 0.75)
        ]
        book = {
            "began": at,
            "time": until,
            "resumed_from": begin,
            "seconds": dict.fromkeys(BOOKS[:-1], 0.0) | SECONDS,
            "marks": marks,
            "moments": moments,
        }
        run.seconds(number).write_text(json.dumps(book))
        (run.attempt(number) / "rank-0.stamp").write_text(f"{end} update {until:.3f} 1 {host} 1\n")
        outcome = Outcome.COMPLETED if last else Outcome.FAILED
        text = f"completed at step {steps}" if last else message
        write_ending(run, number, Ending(outcome, text, end, time=until))
        at = until + 30.0
    return run


def a_step(step: int, steps: int, source: str = "library", lr: float = 1e-3) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    values: dict[str, Any] = {
        "step": step,
        "updates": step,
        "loss": 2.0 + 4.0 / (1 + step / 20) + 0.1 * math.sin(step * 1.7),
        "grad_norm": 1.0 + 3.0 / step,
        "lr": lr * min(1.0, step / (steps / 10)),
        "tokens": step * 4096,
        "tokens_per_second": 2000.0 + 30 * math.sin(step),
        "step_seconds": 2.0 if step > 1 else 40.0,
        "data_seconds": 0.1,
        "skipped": step == steps // 2,
        f"data.{source}.tokens": step * 4096,
        f"data.{source}.epoch": step / steps,
    }
    if step % max(1, steps // 10) == 0:
        values |= {"val_loss": values["loss"] + 0.05, "train_loss": values["loss"]}
        values |= {"checkpoint_step": step, "checkpoint_seconds": 0.4, "checkpoint_stall_seconds": 0.003}
        values |= {"checkpoint_write_bytes_per_second": 3.1e8}
    return values
