"""`stoker plan --run` and `stoker report`: what was predicted of a run beside what its steps measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory, write_config
from stoker.conf.schema import Config
from stoker.launch.cli import main
from stoker.launch.report.gather import gather
from stoker.launch.report.other_forms import as_json, as_markdown
from stoker.launch.report.page import page
from stoker.trainer.report.predicted import Measured, Predicted, beside, keep, read_predicted
from tests.launch.report.fabricated import a_run

PREDICTED = Predicted("cuda", "dp_shard 2, ZeRO 3, fsdp", 2, "H100", 0, 900, 1000, 2.0, 4000.0, 400.0, 0.4)


def test_measured_are_medians_after_the_first_steps_of_an_attempt_without_evaluations() -> None:
    measured = Measured(since=10)
    seconds = {9: 9.0, 10: 9.0, 11: 50.0, 12: 40.0, 13: 1.0, 14: 3.0, 15: 5.0, 16: 99.0}
    for step, value in seconds.items():
        line = {"step": step, "step_seconds": value, "memory_peak_bytes": 100 * step, "mfu": None}
        measured.add(line | ({"val_loss": 1.0} if step == 16 else {}))
    rows = {row["name"]: row for row in beside(PREDICTED, measured)}
    assert rows["step_seconds"]["measured"] == 3.0 and rows["step_seconds"]["ratio"] == 1.5
    assert rows["memory_peak_bytes"]["measured"] == 1600 and rows["memory_peak_bytes"]["ratio"] == 1.6
    assert rows["mfu"] == {"name": "mfu", "predicted": 0.4, "measured": None, "ratio": None}
    unknown = dataclasses.replace(PREDICTED, step_seconds=None, tflops=None, mfu=None)
    assert "tflops" not in {row["name"] for row in beside(unknown, measured)}, "neither has it"


def test_a_report_has_the_plan_of_the_newest_attempt_beside_its_steps(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    assert "Plan against measured" not in page([gather(str(run.path))])
    keep(run, 2, dataclasses.replace(PREDICTED, step_seconds=1.0))
    assert "Plan against measured" not in page([gather(str(run.path))]), "of an attempt that is over"
    keep(run, 3, PREDICTED)
    found = gather(str(run.path))
    assert "Plan against measured" in page([found])
    assert "| step | 2.00 s | 2.00 s | 100% |" in as_markdown([found])
    rows = json.loads(as_json([found]))["runs"][0]["plan_against_measured"]
    assert {k: rows[2][k] for k in ("name", "predicted")} == {"name": "tokens_per_second", "predicted": 4000.0}
    run.plan(3).write_text('{"kind": 7}')
    damaged = gather(str(run.path))
    assert damaged.planned == [] and any("plan of attempt 3" in line for line in damaged.problems)


def test_a_run_is_planned_as_it_is_stored_and_the_plan_is_kept_in_its_newest_attempt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, a_tiny_run: RunDirectory
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    path = str(a_tiny_run.path)
    assert main(["plan", "--run", path]) == 0
    out = capsys.readouterr().out
    assert "on 2 CPUs" in out and "plan of attempt 3 against measured" in out
    kept = read_predicted(a_tiny_run, 3)
    assert kept is not None and kept.ranks == 2 and kept.device is None and kept.step_seconds is None
    assert 0 < kept.counted_bytes < kept.memory_peak_bytes
    assert "memory of the worst rank" in as_markdown([gather(path)])


@pytest.fixture
def a_tiny_run(tmp_path: Path) -> RunDirectory:
    run = a_run(tmp_path / "tiny")
    config = Config(seq_len=32)
    config.model = dataclasses.replace(config.model, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    config.run.dir = str(run.path)
    write_config(run, config)
    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run", "no-run"], "is not a run directory"),
        (["--run", "no-run", "--gpus", "2"], "--run no-run: it is planned as it is stored, without --gpus"),
        (["--run", "no-run", "seq_len=7"], "it is planned as it is stored, without seq_len=7"),
    ],
)
def test_only_runs_are_planned_and_without_settings(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_run_of_which_no_attempt_began_has_no_plan(tmp_path: Path, printed: Callable[..., str]) -> None:
    RunDirectory(tmp_path / "run").attempt(1).mkdir(parents=True)
    assert "has no attempt that began to train" in printed("plan", "--run", str(tmp_path / "run"))


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str) -> str:
        assert main([*words]) == 2
        return capsys.readouterr().err

    return run
