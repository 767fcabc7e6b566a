"""A module `wandb` that records its calls, and attempts of a run with a tracker."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import TrackerConfig
from stoker.trainer.report.metrics import MetricsFile
from stoker.trainer.report.observer import Observer
from stoker.trainer.report.observers import Observers
from stoker.trainer.report.tracker_process import LINGER_SECONDS
from stoker.trainer.report.trackers import Tracker
from tests.trainer.report.observed import a_config, record

FAKE_WANDB = """
import json, os, sys, time


def note(**what):
    with open(os.environ["FAKE_WANDB"], "a") as file:
        file.write(json.dumps(what) + "\\n")


class Run:
    url = "http://fake"
    summary = {}

    def log(self, values, step):
        if step == int(os.environ.get("FAKE_RAISES_AT", 0)):
            raise RuntimeError("the service is gone.")
        time.sleep(float(os.environ.get("FAKE_LOG_SECONDS", 0)))
        note(step=step, values=values)

    def finish(self, exit_code):
        if os.environ.get("FAKE_HANGS"):
            time.sleep(600)
        note(finish=exit_code, outcome=self.summary["outcome"])


def init(**settings):
    print("wandb: chatter")
    note(init=settings, heavy=[name for name in ("torch", "trainer") if name in sys.modules])
    return Run()
"""


class Fake:
    """A module `wandb` that records its calls, for the tracker's process to import."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        directory.mkdir()
        (directory / "wandb.py").write_text(FAKE_WANDB)
        self._notes = directory / "notes"
        monkeypatch.setenv("PYTHONPATH", f"{directory}:{os.getcwd()}")
        monkeypatch.setenv("FAKE_WANDB", str(self._notes))
        monkeypatch.setenv("NETRC", str(directory / "no netrc"))
        for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
            monkeypatch.delenv(variable, raising=False)

    def notes(self, key: str) -> list:
        lines = map(json.loads, self._notes.read_text().splitlines()) if self._notes.exists() else []
        return [line[key] for line in lines if key in line]


class Screen(Observer):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


class Attempt:
    """The observers of one attempt, with a tracker."""

    def __init__(self, run: RunDirectory, tracker: TrackerConfig, resumed_from_step: int | None) -> None:
        self.screen = Screen()
        self.observers = Observers(MetricsFile(run.metrics), [self.screen])
        self.tracker = Tracker(tracker.names[0], tracker, run, say=self.observers.message)
        self.observers.add(self.tracker)
        self.observers.start(a_config(), resumed_from_step, 200, {"layout": "1 rank"})

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.observers.step(record(step))


def train(run: RunDirectory, name: str, first: int, last: int, outcome: str = "completed", **tracker) -> list[str]:
    """One whole attempt, and the end of its tracker's process; its messages."""
    attempt = Attempt(run, TrackerConfig(names=[name], **tracker), first - 1 or None)
    attempt.train(first, last)
    attempt.observers.finish(outcome, last)
    if attempt.tracker._process is not None:
        attempt.tracker._process.wait(LINGER_SECONDS + 10)  # on a busy machine it goes on in the background
    return attempt.screen.messages
