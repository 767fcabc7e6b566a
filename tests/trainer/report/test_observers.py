from __future__ import annotations

import errno
import io
import subprocess
import sys

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.trainer.report.metrics import MetricsFile, read
from stoker.trainer.report.observer import Observer
from stoker.trainer.report.observers import Observers, open_observers
from tests.trainer.report.observed import Report, a_config, record


class Recorder(Observer):
    name = "recorder"

    def __init__(self) -> None:
        self.seen: list = []

    def start(self, config, resumed_from_step, total_steps, facts):
        self.seen.append("start")

    def step(self, record):
        self.seen.append(record.step)

    def saving(self, step):
        self.seen.append(f"saving {step}")

    def checkpoint(self, report):
        self.seen.append(f"saved {report.step}")

    def message(self, text):
        self.seen.append(text)

    def finish(self, outcome, step):
        self.seen.append(outcome)


class Failing(Observer):
    name = "tracker broken"

    def __init__(self) -> None:
        self.calls = 0

    def step(self, record):
        self.calls += 1
        if record.step == 2:
            raise RuntimeError("no network\nand a long story")


def test_every_event_reaches_every_observer(tmp_path):
    recorder = Recorder()
    observers = Observers(MetricsFile(tmp_path / "m"), [recorder])
    observers.start(a_config(), None, 3, {})
    observers.step(record(1))
    observers.saving(1)
    observers.checkpoint(Report(1))
    observers.message("hello")
    observers.finish("completed", 1)
    assert recorder.seen == ["start", 1, "saving 1", "saved 1", "hello", "completed"]


def test_an_observer_that_fails_is_switched_off_with_one_message_and_the_others_continue(tmp_path):
    recorder, failing = Recorder(), Failing()
    observers = Observers(MetricsFile(tmp_path / "m"), [failing, recorder])
    observers.start(a_config(), None, 4, {})
    for step in range(1, 5):
        observers.step(record(step))
    message = "tracker broken switched off, training goes on: no network"
    assert recorder.seen == ["start", 1, message, 2, 3, 4]
    assert failing.calls == 2
    assert len(read(tmp_path / "m")) == 4


def test_a_screen_that_fails_does_not_end_the_run(tmp_path):
    class Deaf(Failing):
        def message(self, text):
            raise BrokenPipeError

    observers = Observers(MetricsFile(tmp_path / "m"), [Deaf(), Deaf()])
    observers.start(a_config(), None, 4, {})
    for step in range(1, 5):
        observers.step(record(step))
    observers.finish("completed", 4)
    assert len(read(tmp_path / "m")) == 4


def test_errors_of_the_metrics_file_surface_and_the_terminal_is_still_put_in_order(tmp_path, monkeypatch):
    recorder = Recorder()
    observers = Observers(MetricsFile(tmp_path / "m"), [recorder])
    observers.start(a_config(), None, 4, {})

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.write", refuse)
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match=f"{tmp_path}/m"):
        observers.step(record(1))
    with pytest.raises(OSError, match=f"{tmp_path}/m"):
        observers.finish("failed", 0)
    assert recorder.seen[-1] == "failed"


def test_the_log_has_lines_of_training_whatever_the_screen_shows(tmp_path):
    config, screen, log = a_config(), io.StringIO(), io.StringIO()
    config.log.progress, config.log.every = "none", 2
    observers = open_observers(config, tmp_path, screen, log)
    observers.start(config, 3, 200, {"layout": "1 rank"})
    for step in range(4, 8):
        observers.step(record(step))
    observers.message("hello")
    lines = log.getvalue().splitlines()
    assert lines[:2] == ["layout     1 rank", "resumed from step 3"] and lines[-1] == "hello"
    assert [line.split()[1] for line in lines[2:-1]] == ["4/200", "6/200"]
    log.close()  # or its disk is full
    observers.step(record(8))
    observers.finish("completed", 8)
    assert screen.getvalue() == "" and [step["step"] for step in read(RunDirectory(tmp_path).metrics)] == [
        4,
        5,
        6,
        7,
        8,
    ]


def test_plain_observers_import_nothing_heavy(tmp_path):
    program = f"""
import io, pathlib, sys
from stoker.conf.schema import Config
from stoker.trainer.report.observers import open_observers
observers = open_observers(Config(), pathlib.Path({str(tmp_path)!r}), io.StringIO())
observers.start(Config(), None, 1, {{}})
observers.finish("completed", 0)
import stoker.trainer.report.summary, stoker.trainer.report.trackers
print([name for name in ("torch", "rich", "wandb", "tensorboard", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
