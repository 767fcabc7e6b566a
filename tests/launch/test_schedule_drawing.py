"""`stoker config --schedule`."""

from __future__ import annotations

import pytest

from stoker.launch.cli import main


def test_it_shows_the_turns_of_the_rate_and_the_sizes_of_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["schedule=wsd", "steps=400", "schedule.warmup_steps=20", "schedule.decays=[[121,160]]", "optim.lr=1e-3"]
    assert main(["config", "--schedule", *words, "batch.ramp=[[8,81920]]", "seq_len=512", "launch.nproc=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("learning rate of 400 steps, schedule=wsd") and max(map(len, lines)) <= 120
    drawn = [line.partition("|")[2] for line in lines if "|" in line]
    assert len(drawn) == 10 and drawn[0].strip() and drawn[-1].startswith("*")
    steps = [line for line in lines if line.startswith("step ")]
    assert steps == [
        "step 1: 5e-05", "step 20: 0.001", "step 120: 0.001", "step 160: 0.0001",
        "step 161: 0.001", "step 320: 0.001", "step 400: 0.0001",
    ]  # fmt: skip
    assert lines[-2:] == [
        "batch of 8 sequences from step 1 on, after 0 tokens",
        "batch of 32 sequences from step 21 on, after 81,920 tokens",
    ]
