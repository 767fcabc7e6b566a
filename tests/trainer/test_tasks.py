"""When the tasks of a run are run, and what a stop leaves for its next start. lm-eval has no part in it."""

from __future__ import annotations

import importlib.util
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stoker
from stoker.conf.rundir import RunDirectory
from stoker.trainer import assemble
from stoker.trainer.loop import Trainer
from stoker.trainer.report.metrics import read
from stoker.trainer.report.task_results import in_words, results, task_metrics
from stoker.trainer.runtime.outcome import Outcome
from stoker.trainer.tasks import metrics_of
from tests.launch.runs import overrides, write_text

ASKED = ["eval.tasks=[mine]", "launch.nproc=1", "parallel.zero=0", "checkpoint.every=0", "log.progress=none"]


class Answers:
    """In the place of `TaskEvaluation`: notes the steps, and what it was asked for after them."""

    stop_at: int | None = None
    asked: list[int] = []  # noqa: RUF012

    def __init__(self, *_: Any) -> None: ...

    def metrics(self, trainer: Trainer, step: int, given_up: Callable[[], bool]) -> dict[str, float] | None:
        Answers.asked.append(step)
        if step == Answers.stop_at:
            Answers.stop_at = None
            trainer.requests.signal = signal.SIGINT
        return None if given_up() else {"tasks/step": step, "tasks/mine/acc": step / 100}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Starts a run, and returns the lines of its metrics."""
    monkeypatch.setattr(assemble, "TaskEvaluation", Answers)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "lm_eval" or find(name, *rest))
    monkeypatch.setattr(Answers, "asked", [])
    data = write_text(tmp_path / "text")

    def start(*more: str, outcome: Outcome = Outcome.COMPLETED) -> list[dict[str, Any]]:
        words = overrides(tmp_path / "run", data, *ASKED, f"data.cache={tmp_path / 'cache'}", *more)
        assert stoker.run(words).outcome is outcome
        return read(RunDirectory(tmp_path / "run").metrics)

    return start


def shown(steps: list[dict[str, Any]]) -> dict[int, float]:
    """The step whose weights the tasks of a line had, by the step of the line."""
    return {step["step"]: step["tasks/step"] for step in steps if "tasks/step" in step}


def test_tasks_are_run_every_so_many_steps_and_after_the_last(run: Callable[..., list[dict[str, Any]]]) -> None:
    assert shown(run("steps=5", "eval.tasks_every=2")) == {2: 2, 4: 4, 5: 5}
    assert shown(run("steps=7", "eval.tasks_every=0")) == {2: 2, 4: 4, 5: 5, 7: 7}  # continued
    assert Answers.asked == [2, 4, 5, 7]


def test_what_a_stop_leaves_is_run_once_when_the_run_is_resumed(run: Callable[..., list[dict[str, Any]]]) -> None:
    Answers.stop_at = 3
    assert shown(run("steps=8", "eval.tasks_every=3", outcome=Outcome.STOPPED)) == {}
    steps = run("steps=8", "eval.tasks_every=3")
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert shown(steps) == {4: 3, 6: 6, 8: 8} and Answers.asked == [3, 3, 6, 8]
    assert steps[3]["tasks/mine/acc"] == 0.03


def test_what_a_stop_leaves_twice_is_not_lost(run: Callable[..., list[dict[str, Any]]]) -> None:
    for _ in range(2):
        Answers.stop_at = 3
        assert shown(run("steps=8", "eval.tasks_every=3", outcome=Outcome.STOPPED)) == {}
    assert shown(run("steps=8", "eval.tasks_every=3")) == {4: 3, 6: 6, 8: 8}


def test_a_stop_in_the_last_tasks_waits_for_them(run: Callable[..., list[dict[str, Any]]]) -> None:
    Answers.stop_at = 2
    assert shown(run("steps=2", "eval.tasks_every=0")) == {2: 2}


def test_results_are_metrics_and_words() -> None:
    found = metrics_of(
        {
            "mine": {"alias": "mine", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 12},
            "other": {"exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A", "ppl,none": math.inf},
        }
    )
    assert found == {
        "tasks/mine/acc": 0.5,
        "tasks/mine/acc_stderr": 0.1,
        "tasks/other/exact_match.strict": 0.25,
    }
    line = {"step": 7, "tasks/step": 7, **found}
    assert results(line)["mine", "acc"] == (0.5, 0.1) and results(line)["other", "exact_match.strict"] == (0.25, None)
    assert task_metrics(line) == ["tasks/mine/acc", "tasks/other/exact_match.strict"]
    assert in_words(line) == "mine acc 0.5; other exact_match.strict 0.25 (step 7)"
    assert in_words({"step": 8, "loss": 1.0}) is None
    assert in_words({"tasks/step": 3, "tasks/failed": 1}) == "failed (step 3)"
