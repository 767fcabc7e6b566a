"""`stoker eval` beside lm-eval's own model `hf`: tasks of each output type, made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stoker.conf.schema import Config
from stoker.launch import evaluate
from stoker.launch.cli import main
from tests.data.counted import write_lines
from tests.extent import some
from tests.launch.runs import launch_forked, train_here

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

SETTINGS = ["seq_len=64", "batch.size=4", "launch.device=cpu", "launch.threads=1", "precision=fp32"]
QUESTIONS = [
    {"q": f"How many are {n} and {m}? ", "choices": [f"{n + m}", f"{n}", "none of them at all"], "gold": m % 3}
    for n in range(4)
    for m in range(2, 5)
]
TASKS: dict[str, dict[str, Any]] = {
    "made_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "made_loglikelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "made_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q * 6}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "made_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its model and tokenizer, and the tasks with their questions."""
    home = tmp_path_factory.mktemp("eval")
    (home / "text").mkdir()
    (home / "text" / "a.txt").write_text("How many are 1 and 2? 3 and none of them at all. " * 40)
    small = ["model=tiny", "model.num_hidden_layers=2", "model.hidden_size=64", "model.intermediate_size=96"]
    data = ["data=text", f"data.path={home / 'text'}", f"data.cache={home / 'cache'}", "data.workers=0"]
    given = [*SETTINGS, *small, *data, "steps=3", "optim.lr=1e-2", "log.progress=none", "launch.nproc=1"]
    train_here(home, [f"run.dir={home / 'run'}", *given])
    assert main(["export", str(home / "run"), str(home / "model")]) == 0
    write_lines(home / "questions.jsonl", QUESTIONS)
    (home / "tasks").mkdir()
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(home / "questions.jsonl")}}}
        (home / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, **data, "test_split": "test", **task}))
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


def of_hugging_face(home: Path, model: Path) -> dict[str, dict[str, Any]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=str(model), device="cpu", dtype="float32", max_length=64, batch_size=2)
    manager = TaskManager(include_path=str(home / "tasks"))
    found = simple_evaluate(theirs, tasks=list(TASKS), task_manager=manager, log_samples=False, bootstrap_iters=100)
    return found["results"]


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
