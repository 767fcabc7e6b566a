"""`nonfinite.spike` in whole runs: a loss or a norm above its ceiling is skipped, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.trainer.report.metrics import read
from tests.launch.runs import overrides, train_here, write_text
from tests.trainer.spiking import LOSS, NORM

WORDS = [
    "launch.nproc=1", "parallel.zero=0", "batch.micro_size=8", "steps=32", "checkpoint.every=0",
    "model.target=tests.trainer.spiking:build",
]  # fmt: skip


@pytest.mark.parametrize(("spike", "left_out"), [("nonfinite.spike=20", [LOSS, NORM]), ("nonfinite.spike=null", [])])
def test_a_step_whose_loss_or_norm_exceeds_its_ceiling_is_skipped(
    tmp_path: Path, spike: str, left_out: list[int]
) -> None:
    write_text(tmp_path / "text")
    train_here(tmp_path, overrides(tmp_path / "run", tmp_path / "text", *WORDS, spike))
    steps = read(tmp_path / "run" / "metrics.jsonl")
    assert [step["step"] for step in steps if step["skipped"]] == left_out
    assert steps[-1]["updates"] == 32 - len(left_out)
    usual_loss = max(step["loss"] for step in steps if step["step"] != LOSS)
    usual_norm = max(step["grad_norm"] for step in steps if step["step"] < NORM)
    assert steps[LOSS - 1]["loss"] > 10 * usual_loss and steps[LOSS - 1]["grad_norm"] < 2 * usual_norm
    assert steps[NORM - 1]["grad_norm"] > 10 * usual_norm and steps[NORM - 1]["loss"] < 2 * usual_loss
