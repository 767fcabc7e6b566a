"""Runs that an earlier version made, with its keys and import paths, continue as they would have there.

`golden/indexed` and `golden/streaming` were trained for 6 steps before keys, rooms and targets got their present names;
`golden/expected.json` holds what that version computed from there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.launch.cli import main
from tests.launch.runs import steps_of, train_here

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
DATA = {"indexed": "text", "streaming": "lines.jsonl"}
# On the processor that made them all is equal to the last bit; another one sums in another order.
SAME = {"rel": 1e-6}


def copied(name: str, tmp_path: Path) -> RunDirectory:
    shutil.copytree(GOLDEN / name, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("name", list(DATA))
def test_a_run_stored_under_old_names_resumes(name: str, tmp_path: Path) -> None:
    run = copied(name, tmp_path)
    words = [f"run.dir={run.path}", f"data.path={GOLDEN / DATA[name]}", "steps=10", "launch.nproc=1", "parallel.zero=0"]
    train_here(tmp_path, words)
    expected: dict[str, Any] = EXPECTED[name]
    assert steps_of(run.path) == [tuple(pytest.approx(value, **SAME) for value in step) for step in expected["steps"]]
    stored = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    losses = [step["val_loss"] for step in stored if step.get("val_loss") is not None]
    assert losses == pytest.approx(expected["val_loss"], **SAME)


def test_a_run_stored_under_old_names_exports_the_same_file(tmp_path: Path) -> None:
    run = copied("indexed", tmp_path)
    assert main(["export", str(run.path), str(tmp_path / "out")]) == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == EXPECTED["exported_sha256"]
    config = json.loads((GOLDEN / "exported_config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_a_run_stored_under_old_names_generates_and_diffs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = copied("indexed", tmp_path)
    assert main(["generate", str(run.path), "--prompt", "document ", "--tokens", "20", "--greedy"]) == 0
    assert capsys.readouterr().out == EXPECTED["generated"]
    assert main(["checkpoint", "diff", str(run.path), "3", "6", "--all"]) == 1  # they differ
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {line[0]: line[1] for line in words if len(line) == 2 and "/" in line[0]}
    assert found.items() >= EXPECTED["difference"].items()
