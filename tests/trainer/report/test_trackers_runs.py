"""The tracker run of a run directory, and whether it has one at all: variables, copies, full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading

import pytest

from stoker.conf.identity import identify
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import TrackerConfig
from stoker.trainer.report import tracker_process
from stoker.trainer.report.trackers import wandb_mode
from tests.trainer.report.fake_wandb import Attempt, Fake, train
from tests.trainer.report.observed import a_run


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return Fake(tmp_path / "fake", monkeypatch)


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "run"}, "online"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": ""}, "online"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "disabled"),
        ({"WANDB_DISABLED": "false"}, "online"),
        ({"WANDB_MODE": ""}, "online"),
    ],
    ids=str,
)
def test_the_variables_of_wandb_are_followed(variables, mode):
    assert wandb_mode(TrackerConfig(name="wandb"), {"WANDB_API_KEY": "secret", **variables})[0] == mode
    assert wandb_mode(TrackerConfig(name="wandb", mode="offline"), variables)[0] == "offline", "the config is nearer"


def test_a_mode_that_wandb_does_not_have_switches_the_tracker_off(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    messages = train(a_run(tmp_path / "run"), "wandb", 1, 2)
    assert len(messages) == 1 and "WANDB_MODE=ofline" in messages[0] and "offline" in messages[0]
    assert fake.notes("init") == []


@pytest.mark.parametrize(("variable", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
def test_a_disabled_wandb_is_not_started_and_writes_nothing(tmp_path, fake, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    run = a_run(tmp_path / "run")
    attempt = Attempt(run, TrackerConfig(name="wandb"), None)
    attempt.train(1, 3)
    attempt.observers.rolled_back(2)
    attempt.train(3, 4)
    attempt.observers.finish("completed", 4)
    assert len(attempt.screen.messages) == 1 and variable in attempt.screen.messages[0]
    assert fake.notes("init") == [] and sorted(path.name for path in run.path.iterdir()) == ["metrics.jsonl"]


def test_a_copied_run_directory_is_another_run_of_the_tracker(tmp_path, fake):
    original = a_run(tmp_path / "run")
    identify(original)
    train(original, "wandb", 1, 3)
    copy = RunDirectory(tmp_path / "copy")
    shutil.copytree(original.path, copy.path)
    identify(copy)
    messages = train(copy, "wandb", 4, 5)
    train(original, "wandb", 4, 6)
    first, second, third = (settings["id"] for settings in fake.notes("init"))
    assert first == third != second
    assert any(f"a copy of the one of wandb run {first}" in message for message in messages)
    assert fake.notes("step") == [1, 2, 3, 1, 2, 3, 4, 5, 4, 5, 6], "its curve is whole"
    assert json.loads((copy.path / "tracker.json").read_text())["run_id"] == second


def test_a_run_of_an_older_version_keeps_its_run_of_the_tracker(tmp_path, fake):
    run = a_run(tmp_path / "run")
    train(run, "wandb", 1, 3)
    values = json.loads((run.path / "tracker.json").read_text())
    (run.path / "tracker.json").write_text(json.dumps({key: values[key] for key in values if key != "run"}))
    identify(run)
    train(run, "wandb", 4, 5)
    first, second = (settings["id"] for settings in fake.notes("init"))
    assert first == second


def test_a_tracker_waits_for_room_and_does_not_follow_links(tmp_path, monkeypatch):
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "tracker.json.new").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="symbolic"):
        tracker_process.Memory(tmp_path, "wandb", None, print)
    assert (tmp_path / "theirs").read_text() == "precious"
    (tmp_path / "tracker.json.new").unlink()
    refusals = [1, 1]

    def replace(*paths):
        if refusals:
            refusals.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        os.rename(*paths)

    monkeypatch.setattr("os.replace", replace)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    tracker_process.Memory(tmp_path, "wandb", None, print).advance(7)
    assert json.loads((tmp_path / "tracker.json").read_text())["last_step"] == 7


def test_a_file_that_was_cut_back_is_left_to_the_next_tracker(tmp_path):
    (tmp_path / "m").write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 2.0}\n')
    given: list[int] = []

    class Sink:
        def log(self, step, values):
            given.append(step)

        def flush(self):
            os.truncate(tmp_path / "m", 10)

    with open(tmp_path / "m", "rb", buffering=0) as file:
        tracker_process.follow(file, tracker_process.Memory(tmp_path, "wandb", None, print), Sink(), threading.Event())
    assert given == [1, 2]
