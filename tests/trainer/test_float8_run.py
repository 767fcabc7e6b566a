"""A run with precision=fp8 on real text: its curve beside that of bf16, and its end and resumption."""

from __future__ import annotations

import argparse
import inspect
import tarfile
import typing
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.trainer.report.metrics import read
from tests.launch.runs import assert_same_state, steps_of, train_here

WORDS = [
    "data=text", "model.hidden_size=64", "model.intermediate_size=128",
    "model.num_hidden_layers=2", "model.num_attention_heads=4", "seq_len=64", "batch.size=8", "launch.nproc=1",
    "optim.lr=3e-3", "schedule.warmup_steps=20", "eval.sequences=0",
]  # fmt: skip


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    text = "".join(inspect.getsource(module) for module in (argparse, tarfile, typing))
    (tmp_path / "text.txt").write_text(text)
    return [*WORDS, f"data.path={tmp_path / 'text.txt'}"]


@pytest.mark.full
def test_three_hundred_steps_end_within_a_percent_of_bf16(tmp_path: Path, words: list[str]) -> None:
    losses = {}
    for precision in ("fp8", "bf16"):
        train_here(tmp_path, [f"run.dir={tmp_path / precision}", f"precision={precision}", "steps=300", *words])
        losses[precision] = [step["loss"] for step in read(RunDirectory(tmp_path / precision).metrics)]
    assert len(losses["fp8"]) == 300
    first, last = ({name: sum(span(found)) / 30 for name, found in losses.items()} for span in (
        lambda found: found[:30], lambda found: found[-30:]
    ))  # fmt: skip
    assert last["bf16"] < 0.75 * first["bf16"], "it has not learned"
    assert losses["fp8"][0] == pytest.approx(losses["bf16"][0], rel=1e-3)
    assert losses["fp8"] != losses["bf16"]
    assert last["fp8"] == pytest.approx(last["bf16"], rel=1e-2)


@pytest.mark.long
def test_a_run_that_is_interrupted_is_the_same_to_the_last_bit(tmp_path: Path, words: list[str]) -> None:
    words = ["precision=fp8", "schedule.total_steps=4", *words, "schedule.warmup_steps=1"]
    train_here(tmp_path, [f"run.dir={tmp_path / 'whole'}", "steps=4", *words])
    for steps in (2, 4):
        train_here(tmp_path, [f"run.dir={tmp_path / 'parts'}", f"steps={steps}", *words])
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")
    assert_same_state(tmp_path / "parts", tmp_path / "whole")
