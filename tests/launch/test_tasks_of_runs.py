"""`eval.tasks`: a run with tasks computes what it computes without, and they find what lm-eval finds in its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.launch.cli import main
from stoker.trainer.report.metrics import read
from tests.extent import some
from tests.launch.made_tasks import TASKS, of_hugging_face, small_run, write_tasks
from tests.launch.runs import assert_same_state, steps_of, train_forked, train_here

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

ASKED = [f"eval.tasks=[{','.join(TASKS)}]", "eval.tasks_every=2"]
LAYOUTS = [["parallel.zero=3", "data.document_mask=true"], ["parallel.tp=2"], ["parallel.pp=2", "batch.micro_size=2"]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tasks")
    write_tasks(home)
    return home


@pytest.fixture(autouse=True)
def _cached(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.mark.long
@pytest.mark.parametrize("number", some(range(len(LAYOUTS)), len(LAYOUTS)))
def test_a_run_with_tasks_is_the_run_without(number: int, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*small_run(home), *LAYOUTS[number], "steps=3", "launch.nproc=2"]
    asked, plain = home / f"asked {number}", home / f"plain {number}"
    train_here(home, [f"run.dir={plain}", *given])
    train_here(home, [f"run.dir={asked}", *given, *ASKED, f"eval.include={home / 'tasks'}"])
    assert steps_of(asked) == steps_of(plain)
    assert_same_state(asked, plain)

    steps = read(RunDirectory(asked).metrics)
    assert [step.get("tasks/step") for step in steps] == [None, 2, 3]
    assert main(["export", str(asked), str(home / f"model {number}")]) == 0
    compared = 0
    for task, values in of_hugging_face(home, home / f"model {number}").items():
        for name, value in values.items():
            if isinstance(value, float) and "stderr" not in name:
                found = steps[-1][f"tasks/{task}/{name.partition(',')[0]}"]
                assert found == pytest.approx(value, rel=1e-4), (task, name)
                compared += 1
    assert compared >= 7

    capsys.readouterr()
    assert main(["status", str(asked)]) == 0
    assert "made_choice acc" in capsys.readouterr().out
    assert main(["report", str(asked), "-o", str(home / "report.html")]) == 0
    page = (home / "report.html").read_text()
    assert "made_choice/acc" in page and "standard error" in page


@pytest.mark.long
def test_tasks_that_cannot_be_run_are_refused_before_the_first_step(home: Path) -> None:
    sampling = {**TASKS["made_generation"], "generation_kwargs": {"do_sample": True, "until": ["e"]}}
    lost = {**TASKS["made_choice"], "dataset_kwargs": {"data_files": {"test": str(home / "nowhere.jsonl")}}}
    (home / "bad").mkdir()
    for name, task in (("sampling", sampling), ("lost", {**lost, "dataset_path": "json"})):
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(home / "questions.jsonl")}}}
        (home / "bad" / f"{name}.yaml").write_text(json.dumps({"task": name, **data, "test_split": "test", **task}))
    for task, reason in (
        ("sampling", "a task samples its answers"),
        ("lost", "eval.tasks=lost cannot be loaded"),
        ("unknown_task", "there is no task 'unknown_task': eval.include takes a folder"),
    ):
        words = [f"run.dir={home / task}", *small_run(home), "steps=1", "launch.nproc=1"]
        status, output = train_forked(home, [*words, f"eval.tasks=[{task}]", f"eval.include={home / 'bad'}"])
        assert status != 0 and reason in output, output
        assert not read(RunDirectory(home / task).metrics)


@pytest.mark.long
def test_a_task_that_fails_is_reported_and_the_run_goes_on(home: Path) -> None:
    later = "{{q}}{{ 1 // (gold != 1) }}"  # of the first question gold is 2: lm-eval tries that one as it loads a task
    broken = {**TASKS["made_choice"], "task": "broken", "doc_to_text": later, "test_split": "test"}
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(home / "questions.jsonl")}}}
    (home / "broken").mkdir()
    (home / "broken" / "broken.yaml").write_text(json.dumps({**broken, **data}))
    words = [f"run.dir={home / 'fails'}", *small_run(home), "steps=2", "launch.nproc=2", "eval.tasks_every=1"]
    status, output = train_forked(home, [*words, "eval.tasks=[broken]", f"eval.include={home / 'broken'}"])
    assert status == 0, output
    screen = (home / "fails" / "attempts" / "1" / "rank-0.log").read_text()
    assert "warning: the tasks of step 1 failed: ZeroDivisionError" in screen
    steps = read(RunDirectory(home / "fails").metrics)
    assert [(step["tasks/step"], step["tasks/failed"]) for step in steps] == [(1, 1), (2, 1)]
