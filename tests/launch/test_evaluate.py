"""`stoker eval` beside lm-eval's own model `hf`: tasks of each output type, made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stoker.conf.schema import Config
from stoker.launch import evaluate
from stoker.launch.cli import main
from tests.extent import some
from tests.launch.made_tasks import SETTINGS, TASKS, of_hugging_face, small_run, write_tasks
from tests.launch.runs import launch_forked, train_here

pytest.importorskip("lm_eval", reason="the extra eval is not installed")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its model and tokenizer, and the tasks with their questions."""
    home = tmp_path_factory.mktemp("eval")
    train_here(home, [f"run.dir={home / 'run'}", *small_run(home), "steps=3", "launch.nproc=1"])
    assert main(["export", str(home / "run"), str(home / "model")]) == 0
    write_tasks(home)
    return home


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def launch(config: Config, ranks: int, _: object, *arguments: str) -> int:
        status, output = launch_forked(home, config, ranks, *arguments)
        assert status == 0, output
        return status

    monkeypatch.setattr(evaluate, "launch", launch)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")


def evaluated(home: Path, model: Path, *more: str) -> dict[str, dict[str, Any]]:
    out = home / "found.json"
    words = ["--tasks", ",".join(TASKS), "--include", str(home / "tasks"), "-o", str(out)]
    assert main(["eval", str(model), *words, *SETTINGS, *more]) == 0
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())["results"]
    return found


LAYOUTS = [["parallel.tp=2"], ["parallel.pp=2", "batch.micro_size=2"], ["parallel.zero=3"]]


@pytest.mark.long
@pytest.mark.parametrize("layout", some(LAYOUTS, 3), ids=str)
def test_a_layout_answers_as_lm_evals_own_model(home: Path, layout: list[str]) -> None:
    expected = of_hugging_face(home, home / "model")
    found = evaluated(home, home / "model", "launch.nproc=2", *layout)
    compared = 0
    for task, values in expected.items():
        for name, value in values.items():
            if isinstance(value, float) and "stderr" not in name:
                assert found[task][name] == pytest.approx(value, rel=1e-4), (task, name)
                compared += 1
    assert compared >= 7


@pytest.mark.long
def test_a_run_is_evaluated_and_what_cannot_be_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(home, home / "run", "launch.nproc=1")
    assert set(found) == set(TASKS) and 0 <= found["made_choice"]["acc,none"] <= 1
    shown = capsys.readouterr().out
    assert "made_choice" in shown and "acc_norm" in shown
    assert main(["eval", str(home / "model"), "--tasks", "x", *SETTINGS, "parallel.cp=2", "launch.nproc=2"]) == 2
    assert "parallel.cp=1 works" in capsys.readouterr().err
    assert main(["eval", str(home / "model"), "--tasks", "x", "data=chat"]) == 2
    assert "data=chat: tasks bring their texts" in capsys.readouterr().err
