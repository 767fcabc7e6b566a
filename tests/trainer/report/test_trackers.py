from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stoker.conf.schema import TrackerConfig
from stoker.trainer.report import trackers
from stoker.trainer.report.trackers import wandb_mode
from tests.trainer.report.fake_wandb import Attempt, Fake, train
from tests.trainer.report.observed import a_run, record


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return Fake(tmp_path / "fake", monkeypatch)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def offline_records(path: Path):
    """The records of a wandb offline file: a log in LevelDB's format of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, payload = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(payload)
            payload = b""


def test_wandb_offline_keeps_its_run_over_a_restart_and_no_step_is_logged_twice(tmp_path):
    run = a_run(tmp_path / "run")
    train(run, "wandb", 1, 12, mode="offline")
    messages = train(run, "wandb", 9, 20, mode="offline")  # from a checkpoint at step 8
    assert f"wandb is offline (tracker.mode), files in {run.path}/wandb" in messages
    ids, steps, losses = [], [], {}
    for path in sorted(run.path.glob("wandb/offline-run-*/*.wandb")):
        for entry in offline_records(path):
            if entry.HasField("run"):
                ids.append((entry.run.run_id, entry.run.project))
            if entry.HasField("history"):
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in entry.history.item}
                steps.append(values["_step"])
                losses[values["_step"]] = values["loss"]
    assert len(ids) == 2 and len(set(ids)) == 1 and ids[0][1] == "stoker"
    assert steps == list(range(1, 21))
    assert losses == {step: 3.0 / step for step in steps}
    stored = json.loads((run.path / "tracker.json").read_text())
    assert (stored["run_id"], stored["last_step"]) == (ids[0][0], 20)


def test_tensorboard_shows_every_step_once_after_a_restart(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def shown() -> list[int]:
        events = EventAccumulator(str(run.path / "tensorboard"))
        events.Reload()
        return [event.step for event in events.Scalars("loss")]

    run = a_run(tmp_path / "run")
    train(run, "tensorboard", 1, 12)
    train(run, "tensorboard", 9, 20)
    assert shown() == list(range(1, 21))
    (run.path / "tracker.json").unlink()  # everything is given again, and replaces what was there
    train(run, "tensorboard", 19, 24)
    assert shown() == list(range(1, 25))


def test_wandb_resumes_the_same_run_without_touching_the_console(tmp_path, fake):
    run = a_run(tmp_path / "run")
    train(run, "wandb", 1, 3)
    train(run, "wandb", 3, 5)
    first, second = fake.notes("init")
    assert first["id"] == second["id"] and first["resume"] == second["resume"] == "allow"
    assert first["mode"] == "offline" and first["project"] == "stoker" and first["name"] == "run"
    assert first["settings"]["console"] == "off"
    assert first["config"]["facts"] == {"layout": "1 rank"} and first["config"]["optim"]["lr"] == 1e-3
    assert fake.notes("step") == [1, 2, 3, 4, 5]


def test_the_process_of_a_tracker_holds_neither_torch_nor_our_rooms(tmp_path, fake):
    train(a_run(tmp_path / "run"), "wandb", 1, 2)
    assert fake.notes("heavy") == [[]]


def test_a_tracker_gets_numbers_only(tmp_path, fake):
    run = a_run(tmp_path / "run")
    attempt = Attempt(run, TrackerConfig(name="wandb"), None)
    attempt.observers.step(record(1, loss=float("nan"), skipped=True, extra={"loss_scale": 2.0}))
    attempt.observers.finish("stopped", 1)
    (values,) = fake.notes("values")
    assert "loss" not in values and "nonfinite" not in values and "step" not in values
    assert values["grad_norm"] == 0.81 and values["skipped"] == 1 and values["loss_scale"] == 2.0


@pytest.mark.parametrize(("outcome", "exit_code"), [("completed", 0), ("stopped", 0), ("nonfinite", 1)])
def test_the_outcome_reaches_the_tracker(tmp_path, fake, outcome, exit_code):
    train(a_run(tmp_path / "run"), "wandb", 1, 2, outcome)
    assert (fake.notes("finish"), fake.notes("outcome")) == ([exit_code], [outcome])


def test_a_tracker_whose_log_raises_is_switched_off_with_one_message(tmp_path, fake, monkeypatch):
    run = a_run(tmp_path / "run")
    monkeypatch.setenv("FAKE_RAISES_AT", "4")
    attempt = Attempt(run, TrackerConfig(name="wandb"), None)
    attempt.train(1, 8)
    wait_until(lambda: attempt.tracker._process.poll() is not None)
    attempt.train(9, 12)
    reason = f"RuntimeError: the service is gone (more in {run.path}/tracker.log)"
    assert attempt.screen.messages[1:] == [f"tracker wandb switched off, training goes on: {reason}"]
    attempt.observers.finish("completed", 12)
    assert len(attempt.screen.messages) == 2
    assert "Traceback" in (run.path / "tracker.log").read_text()
    assert fake.notes("step") == [1, 2, 3]
    monkeypatch.setenv("FAKE_RAISES_AT", "0")
    train(run, "wandb", 11, 14)
    assert fake.notes("step") == [1, 2, 3, *range(5, 15)]  # it catches up; step 4 may have arrived


def test_a_tracker_whose_process_is_killed_is_switched_off(tmp_path, fake):
    attempt = Attempt(a_run(tmp_path / "run"), TrackerConfig(name="wandb"), None)
    attempt.tracker._process.kill()
    attempt.tracker._process.wait()
    attempt.train(1, 3)
    attempt.observers.finish("completed", 3)
    assert len(attempt.screen.messages) == 2
    assert "switched off, training goes on: its process ended with -9" in attempt.screen.messages[1]


def test_a_failure_at_the_very_end_is_reported_too(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("FAKE_RAISES_AT", "3")
    messages = train(a_run(tmp_path / "run"), "wandb", 1, 3)
    assert len(messages) == 2 and "the service is gone" in messages[1]


def test_a_tracker_that_hangs_does_not_hold_up_the_end(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.5)
    monkeypatch.setenv("FAKE_HANGS", "1")
    attempt = Attempt(a_run(tmp_path / "run"), TrackerConfig(name="wandb"), None)
    attempt.train(1, 3)
    started = time.monotonic()
    attempt.observers.finish("completed", 3)
    seconds = time.monotonic() - started
    attempt.tracker._process.kill()
    attempt.tracker._process.wait()
    assert seconds < 3
    assert (
        attempt.screen.messages[-1] == "tracker wandb is still busy and continues in the background for up to a minute"
    )


def test_kill_9_of_rank_0_loses_no_step_and_repeats_none(tmp_path, fake, monkeypatch):
    run = a_run(tmp_path / "run")
    monkeypatch.setenv("FAKE_LOG_SECONDS", "0.02")  # the ended attempt's tracker still runs when the next one starts
    program = f"""
import os, time
from pathlib import Path
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import TrackerConfig
from tests.trainer.report.test_trackers import Attempt
attempt = Attempt(RunDirectory(Path({str(run.path)!r})), TrackerConfig(name="wandb"), None)
worker = os.fork()  # a data worker holds copies of all that rank 0 has open, and may outlive it for a while
if worker:
    attempt.train(1, 60)
    print(worker, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    wait_until(lambda: fake.notes("step"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    attempt = Attempt(run, TrackerConfig(name="wandb"), 40)
    attempt.train(41, 80)
    attempt.observers.finish("completed", 80)
    wait_until(lambda: len(fake.notes("finish")) == 2)
    os.kill(worker, signal.SIGKILL)
    assert fake.notes("step") == list(range(1, 81))
    assert fake.notes("outcome") == ["killed", "completed"]


def test_a_signal_for_the_ranks_does_not_end_the_tracker(tmp_path, fake):
    attempt = Attempt(a_run(tmp_path / "run"), TrackerConfig(name="wandb"), None)
    wait_until(lambda: fake.notes("init"))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        attempt.tracker._process.send_signal(number)
    attempt.train(1, 3)
    attempt.observers.finish("stopped", 3)
    assert fake.notes("step") == [1, 2, 3] and fake.notes("finish") == [0]


def test_another_tracker_gets_the_whole_run(tmp_path, fake):
    run = a_run(tmp_path / "run")
    train(run, "tensorboard", 1, 5)
    train(run, "wandb", 5, 8)
    assert fake.notes("step") == list(range(1, 9))


def test_wandb_is_online_with_a_key_and_offline_without(tmp_path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    home, nobody = {"HOME": str(tmp_path)}, {"HOME": str(tmp_path / "nobody")}
    config = TrackerConfig(name="wandb")
    assert wandb_mode(config, nobody)[0] == "offline"
    assert wandb_mode(config, home)[0] == "online"
    assert wandb_mode(config, nobody | {"NETRC": str(tmp_path / ".netrc")})[0] == "online"
    (tmp_path / "broken").write_text("nonsense")
    mode, why = wandb_mode(config, nobody | {"NETRC": str(tmp_path / "broken")})
    assert mode == "offline" and str(tmp_path / "broken") in why
    assert wandb_mode(config, home | {"WANDB_BASE_URL": "https://wandb.example.org"})[0] == "offline"
    assert wandb_mode(config, nobody | {"WANDB_API_KEY": "secret"})[0] == "online"
    assert wandb_mode(config, {"WANDB_API_KEY": "secret", "WANDB_MODE": "offline"})[0] == "offline"
    assert wandb_mode(TrackerConfig(name="wandb", mode="offline"), {"WANDB_API_KEY": "secret"})[0] == "offline"
