"""What a report shows of one run, read once from its directory, which may be damaged, running or another user's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from stoker.checkpoint import Summary, describe
from stoker.conf.reasons import reason
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.schema import Config, kinds, lookup
from stoker.launch.control import living
from stoker.launch.inspect import run_at
from stoker.launch.report.experts import ExpertTokens
from stoker.trainer.report.curves import Curves
from stoker.trainer.report.goodput import BOOKS, Account, accounts
from stoker.trainer.report.metrics import steps
from stoker.trainer.report.predicted import Measured, Predicted, beside, read_predicted
from stoker.trainer.report.summary import History
from stoker.trainer.runtime.outcome import Beginning, Ending, read_beginning, read_ending
from stoker.trainer.runtime.process import Stamp, read_stamps

T = TypeVar("T")

MOST_SAVES = 2000
SAVE_METRICS = (
    "checkpoint_step",
    "checkpoint_seconds",
    "checkpoint_stall_seconds",
    "checkpoint_write_bytes_per_second",
    "checkpoint_failed",
)


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks."""

    number: int
    beginning: Beginning | None
    ending: Ending | None
    hosts: tuple[str, ...]
    step: int | None  # the last one known
    running: bool

    @property
    def outcome(self) -> str:
        if self.ending is not None:
            return str(self.ending.outcome)
        return "running" if self.running else "no exit record"

    @property
    def message(self) -> str:
        return self.ending.message if self.ending is not None else ""


@dataclass(frozen=True)
class Gathered:
    """A run as a report shows it. What could not be read is missing, and `problems` has the reasons."""

    name: str
    path: Path
    config: Config | None
    history: History
    curves: Curves
    saves: list[dict[str, float]]  # `SAVE_METRICS` of the steps in which a save ended, the newest ones
    best: tuple[int, float] | None  # step and value of the lowest validation loss
    experts: ExpertTokens | None
    attempts: list[Attempt]
    accounts: list[Account]
    checkpoints: list[Summary]
    alive: Stamp | None
    planned: list[dict[str, Any]]  # of the newest attempt, if `stoker plan --run` was there: predicted and measured
    problems: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> dict[str, float]:
        """Of the whole run, by book."""
        found = {name: sum(account.seconds[name] for account in self.accounts) for name in BOOKS}
        found["down"] += sum(account.down_before for account in self.accounts)
        return found

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float | None:
        """The share of all seconds that trained and were not lost."""
        return self.seconds["training"] / self.total_seconds if self.total_seconds > 0 else None

    @property
    def median_speed(self) -> float | None:
        """Valid tokens per second."""
        speeds = self.history.speeds.items
        return statistics.median(speeds) if speeds else None

    @property
    def state(self) -> str:
        """In words, for the top of the report."""
        if self.alive is not None:
            return f"running: {self.alive.phase} of step {self.alive.step:,}"
        if not self.attempts:
            return "no attempt is recorded"
        last = self.attempts[-1]
        return last.message or last.outcome


def gather(path: str, now: float | None = None) -> Gathered:
    """Read a run. Raises ConfigError where `path` is no run directory; any other damage is in `problems`."""
    run = run_at(path)
    problems: list[str] = []

    def reading(what: str, read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except (ValueError, OSError, OverflowError) as error:
            problems.append(f"{what}: {reason(error)}")
            return otherwise

    config = reading("config", lambda: read_config(run), None)
    none: list[int] = []
    numbers = reading("attempts", run.attempt_numbers, none)
    predicted, measured = _predicted(run, numbers[-1], reading) if numbers else (None, Measured(0))
    watch = _Watch(measured)
    history = reading("metrics", lambda: History(watch.over(steps(run.metrics))), History([]))
    alive = reading("progress stamps", lambda: living(run), None)
    attempts = [_attempt(run, number, reading, alive is not None and number == numbers[-1]) for number in numbers]
    moment = (time.time() if now is None else now) if alive is not None else None
    return Gathered(
        name=(config.run.name if config is not None else None) or run.path.name,
        path=run.path,
        config=config,
        history=history,
        curves=watch.curves,
        saves=watch.saves,
        best=watch.best,
        experts=watch.experts,
        attempts=attempts,
        accounts=reading("books of seconds", lambda: accounts(run, moment), []),
        checkpoints=reading("checkpoints", lambda: describe(run.checkpoints), []),
        alive=alive,
        planned=[] if predicted is None else beside(predicted, measured),
        problems=problems,
    )


def _predicted(run: RunDirectory, number: int, reading: Callable[..., Any]) -> tuple[Predicted | None, Measured]:
    """What was predicted of an attempt, and where its measured figures are to come."""
    predicted: Predicted | None = reading(f"plan of attempt {number}", lambda: read_predicted(run, number), None)
    beginning: Beginning | None = None
    with suppress(ValueError, OSError):  # listed with the attempts
        beginning = read_beginning(run, number)
    return predicted, Measured(0 if beginning is None else beginning.from_step)


def _attempt(run: RunDirectory, number: int, reading: Callable[..., Any], running: bool) -> Attempt:
    stamps: dict[int, Stamp] = reading(f"attempt {number}", lambda: read_stamps(run.attempt(number)), {})
    ending: Ending | None = reading(f"attempt {number}", lambda: read_ending(run, number), None)
    return Attempt(
        number=number,
        beginning=reading(f"attempt {number}", lambda: read_beginning(run, number), None),
        ending=ending,
        hosts=tuple(sorted({stamp.host for stamp in stamps.values()})),
        step=ending.step if ending is not None else max((stamp.step for stamp in stamps.values()), default=None),
        running=running,
    )


class _Watch:
    """What a report needs of the steps beside `History`, taken as they pass."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
        self.curves = Curves()
        self.saves: list[dict[str, float]] = []
        self.best: tuple[int, float] | None = None
        self.experts: ExpertTokens | None = None

    def over(self, steps: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for step in steps:
            self.curves.add(step)
            self._measured.add(step)
            if type(step.get("checkpoint_step")) is int:
                found = {key: step[key] for key in SAVE_METRICS if type(step.get(key)) in (int, float)}
                self.saves.append(found)
                if len(self.saves) > 2 * MOST_SAVES:
                    del self.saves[:MOST_SAVES]
            self.experts = ExpertTokens.of(step) or self.experts
            value = step.get("val_loss")
            if value is not None and (self.best is None or value < self.best[1]):
                self.best = step["step"], value
            yield step


def config_differences(runs: list[Gathered]) -> list[tuple[str, str, list[Any]]]:
    """Keys whose values are not the same in all `runs` that have a config: key, kind, a value for each run.

    The names and places of the runs themselves are left out, and for one run the comparison is with the defaults.
    """
    known = [run.config for run in runs]
    default = Config()
    found = []
    for key, kind in kinds().items():
        if key in ("run.dir", "run.name"):
            continue
        values = [None if config is None else lookup(config, key) for config in known]
        beside = [lookup(default, key)] if len(runs) == 1 else []
        present = [value for value, config in zip(values, known, strict=True) if config is not None]
        if any(value != other for value in present for other in [*present, *beside]):
            found.append((key, kind, values))
    return found
