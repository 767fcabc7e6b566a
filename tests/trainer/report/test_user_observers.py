"""Observers of the user's own: they see every step, may ask for a save or the end, and keep state in checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stoker.checkpoint import newest, read_state
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.trainer.report.early_stopping import EarlyStopping
from stoker.trainer.report.metrics import MetricsFile
from stoker.trainer.report.observer import Observer, StepRecord
from stoker.trainer.report.observers import Observers
from stoker.trainer.runtime.outcome import Outcome, read_ending
from stoker.trainer.trust import code_of
from tests.launch.runs import overrides, steps_of, train_forked, train_here, write_text
from tests.trainer.report.fake_wandb import Screen
from tests.trainer.report.observed import a_config, a_run, record

HERE = "tests.trainer.report.test_user_observers"


class Counting(Observer):
    """Counts steps; asks for a save after step 3, and for the end after `last`."""

    def __init__(self, last: int = 1000, fails: str = "") -> None:
        self.seen, self._last, self._fails = 0, last, fails

    def step(self, record: StepRecord) -> None:
        if self._fails == "step":
            raise RuntimeError("no such step")
        self.seen += 1

    def stop_reason(self) -> str | None:
        if self._fails == "stop_reason":
            raise RuntimeError("no such reason")
        return "that is enough" if self.seen >= self._last else None

    def wants_save(self) -> bool:
        return self.seen == 3

    def state(self) -> Any:
        return {"seen": {1, 2}} if self._fails == "state" else {"seen": self.seen}

    def load_state(self, state: Any) -> None:
        self.seen = state["seen"]


def observers_of(tmp_path: Path, *entries: Any) -> tuple[Observers, Screen]:
    screen = Screen()
    found = Observers(MetricsFile(a_run(tmp_path / "run").metrics), [screen])
    for entry in entries:
        found.add_users(entry)
    found.start(a_config(), None, 200, {})
    return found, screen


def test_votes_and_state_come_from_every_observer(tmp_path: Path) -> None:
    found, screen = observers_of(tmp_path, {"target": f"{HERE}:Counting", "last": 4}, f"{HERE}:Counting")
    asked = []
    for step in range(1, 5):
        found.step(record(step))
        asked.append((found.wants_save(), found.stop_reason()))
    assert asked[:3] == [(False, None), (False, None), (True, None)]
    assert asked[3] == (False, f"observer {HERE}:Counting: that is enough")
    assert found.state() == [{"seen": 4}, {"seen": 4}]
    found.load_state([{"seen": 2}, None])
    assert found.state() == [{"seen": 2}, {"seen": 4}] and screen.messages == []
    found.load_state(None)  # of a checkpoint without observers


@pytest.mark.parametrize("fails", ["step", "stop_reason", "state"])
def test_an_observer_that_raises_is_switched_off_and_ends_nothing(tmp_path: Path, fails: str) -> None:
    found, screen = observers_of(tmp_path, {"target": f"{HERE}:Counting", "fails": fails}, f"{HERE}:Counting")
    for step in (1, 2, 3):
        found.step(record(step))
        found.stop_reason()
        states = found.state()
        json.dumps(states)
    assert states == [None, {"seen": 3}] and found.wants_save()
    assert len(screen.messages) == 1 and f"observer {HERE}:Counting switched off" in screen.messages[0]


def test_an_observer_that_cannot_be_made_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    found, screen = observers_of(tmp_path, {"target": f"{HERE}:Counting", "nonsense": 1}, f"{HERE}:Counting")
    found.step(record(1))
    assert found.state() == [{"seen": 1}]
    assert "cannot be made, training goes on without it" in screen.messages[0] and "nonsense" in screen.messages[0]


def test_early_stopping_counts_values_that_are_not_better() -> None:
    losses = [3.0, 2.0, None, 2.5, 1.999, 2.1, None, 2.2]
    stopping = EarlyStopping(patience=3, min_delta=0.01)
    reasons = []
    for step, loss in enumerate(losses, 1):
        stopping.step(record(step, val_loss=loss))
        reasons.append(stopping.stop_reason())
        again = EarlyStopping(patience=3, min_delta=0.01)
        again.load_state(json.loads(json.dumps(stopping.state())))
        assert again.stop_reason() == reasons[-1]
        stopping = again
    assert reasons[:5] == [None] * 5
    assert reasons[5:] == ["val_loss is no better than 2 of step 2 since 3 values"] * 2 + [
        "val_loss is no better than 2 of step 2 since 4 values"
    ]
    other = EarlyStopping("val_loss.books", patience=1)
    for step in (1, 2):
        other.step(record(step, extra={"val_loss.books": 1.0}))
    assert other.stop_reason() is not None
    with pytest.raises(ValueError, match="at least 1"):
        EarlyStopping(patience=0)


def test_only_early_stopping_is_no_foreign_code() -> None:
    config = Config()
    assert code_of(config) == {}
    config.observers = [{"target": "stoker.trainer.report.early_stopping:EarlyStopping", "patience": 2}]
    assert code_of(config) == {}
    for entry in ("mine:Watch", {"target": "stoker.conf.targets:import_target", "target_": "evil:x"}, {}, 3):
        config.observers = [entry]
        assert code_of(config) == {"observers": [entry]}
    config.alerts.command = "rm -rf /"
    assert code_of(config, ("alerts.",)) == {"alerts.command": "rm -rf /"}


@pytest.mark.long
def test_a_run_ends_saves_and_resumes_as_its_observer_asks(tmp_path: Path) -> None:
    text, run = write_text(tmp_path / "text"), RunDirectory(tmp_path / "run")
    small = ["steps=12", "checkpoint.every=0", "checkpoint.minutes=null", "checkpoint.keep=9"]
    entry = f"observers=[{{target: '{HERE}:Counting', last: 6}}]"
    words = overrides(run.path, text, *small, entry)
    train_here(tmp_path, words)
    ending = read_ending(run, 1)
    assert ending is not None and ending.outcome is Outcome.COMPLETED and "ended by observer" in ending.message
    steps = steps_of(run.path)
    assert 6 <= len(steps) <= 8, "a vote takes effect within two steps"
    saved = sorted(int(path.name.partition("-")[2]) for path in newest(run.checkpoints))
    assert len(saved) == 2 and 3 <= saved[0] <= 6 and saved[1] == len(steps)
    assert read_state(newest(run.checkpoints)[0])["observers"] == [{"seen": len(steps)}]
    train_here(tmp_path, words)
    assert len(steps_of(run.path)) == len(steps), "given again it is still ended"
    train_here(tmp_path, [*words[:-1], "observers=[]"])
    alone = tmp_path / "alone"
    train_here(tmp_path, overrides(alone, text, *small))
    assert steps_of(run.path) == steps_of(alone), "an observer changes nothing that is computed"


def test_a_missing_class_is_refused_before_a_rank_starts(tmp_path: Path) -> None:
    words = overrides(tmp_path / "run", write_text(tmp_path / "text"), "observers=[no.such:Class]")
    status, output = train_forked(tmp_path, words)
    assert status == 2 and "observers[0]: cannot import 'no.such'" in output
