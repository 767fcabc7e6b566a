"""The trials of a sweep: numbers, settings and outcomes, from files in the folder of the sweep."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stoker.conf.durable import open_own, write_durably, write_whole
from stoker.conf.records import read_record
from stoker.conf.rundir import RunDirectory
from stoker.conf.values import ConfigError
from stoker.launch.sweep.points import Point, settings_of
from stoker.trainer.report.metrics import read_recent
from stoker.trainer.runtime.outcome import Outcome, read_ending

_PLAIN = re.compile(r"[\w.+-]+|\[[\w.,+\s-]*\]")  # values that YAML reads as the command line does


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    number: int
    point: Point
    run: RunDirectory

    @property
    def outcome(self) -> str:
        """How its newest attempt ended, in a word: also `not begun` and `no exit record`."""
        numbers = self.run.attempt_numbers()
        if not numbers:
            return "not begun"
        ending = read_ending(self.run, numbers[-1])
        return str(ending.outcome) if ending is not None else "no exit record"

    @property
    def done(self) -> bool:
        """Whether another start would compute nothing new."""
        return self.outcome in (Outcome.COMPLETED, Outcome.NONFINITE)

    def result(self) -> tuple[int, float | None, float | None]:
        """The last step, loss and validation loss that were recorded."""
        step, loss, val_loss = 0, None, None
        for line in read_recent(self.run.metrics):
            step = line["step"]
            loss = line.get("loss") if line.get("loss") is not None else loss
            val_loss = line.get("val_loss") if line.get("val_loss") is not None else val_loss
        return step, loss, val_loss

    def as_result(self) -> dict[str, Any]:
        """What a program that proposes settings learns of it."""
        _, loss, val_loss = self.result()
        value = val_loss if val_loss is not None else loss
        settings = settings_of(self.point)
        return {"number": self.number, "settings": settings, "value": value, "outcome": self.outcome}


@dataclass(frozen=True)
class _Stored:
    """`sweep.json`: the settings of each trial, by number; and the last Slurm job."""

    trials: list[Any]
    job: str | None = None


class Trials:
    """The numbered trials in a folder. A point that has a number keeps it, whatever command comes later."""

    def __init__(self, folder: Path) -> None:
        """Reads what is stored. Raises ValueError, naming the file, where it is damaged."""
        self.folder = folder
        self.job: str | None = None
        self._points: list[Point] = []
        try:
            stored = read_record(self._file, _Stored, "the list of a sweep's trials")
        except FileNotFoundError:
            return
        self.job = stored.job
        for words in stored.trials:
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise ValueError(f"{self._file} is not the list of a sweep's trials: a trial is a list of settings")
            self._points.append(tuple(words))

    @property
    def _file(self) -> Path:
        return self.folder / "sweep.json"

    def all(self) -> list[Trial]:
        return [self._trial(number) for number in range(len(self._points))]

    def of(self, points: Sequence[Point]) -> list[Trial]:
        """The trials of `points`, those that are new added to the list on the disk first."""
        known = {point: number for number, point in enumerate(self._points)}
        for point in points:
            if point not in known:
                known[point] = len(self._points)
                self._points.append(point)
        self.write()
        return [self._trial(known[point]) for point in points]

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = _Stored([list(point) for point in self._points], self.job)
        write_durably(self._file, (json.dumps(asdict(stored)) + "\n").encode())

    def settings_file(self, trial: Trial) -> Path:
        """The settings of a trial as a file for `--config`: an array's tasks differ by its name only."""
        folder = self.folder / "settings"
        folder.mkdir(exist_ok=True)
        lines = [f"{key}: {_yaml(value)}\n" for key, _, value in (word.partition("=") for word in trial.point)]
        path = folder / f"{trial.number}.yaml"
        write_whole(path, "".join(lines).encode())
        return path

    def _trial(self, number: int) -> Trial:
        return Trial(number, self._points[number], RunDirectory(self.folder / str(number)))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Of the processes that would start trials of this folder, one. Raises ConfigError for the others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = open_own(self.folder / "sweep.lock", os.O_WRONLY | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ConfigError(
                f"another process is running the sweep in {self.folder}: wait for it, or end it"
            ) from None
        try:
            yield
        finally:
            os.close(lock)


def _yaml(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else json.dumps(value)
