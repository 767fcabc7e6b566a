"""`stoker plan` refuses what `stoker train` refuses, in the same words: settings drawn at random."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from stoker.launch.cli import main
from tests.extent import FULL

VALUES: dict[str, list[object]] = {
    "launch.nproc": [1, 2, 3, 4, 8],
    "parallel.zero": [0, 1, 2, 3, 4],
    "parallel.tp": [1, 2, 3, 4],
    "parallel.pp": [1, 2, 3, 5],
    "parallel.dp_replicate": ["null", 1, 2, 3],
    "parallel.schedule": ["1f1b", "gpipe", "interleaved", "zigzag"],
    "parallel.stages_per_rank": [1, 2],
    "parallel.sequence_parallel": ["true", "false"],
    "parallel.offload": ["none", "cpu", "disk"],
    "batch.size": [0, 7, 8, 12, 16],
    "batch.micro_size": ["null", 1, 2, 3],
    "model.num_key_value_heads": [1, 2, 3, 4],
    "model.num_hidden_layers": [1, 2, 4],
    "model.head_dim": ["null", 16, 33],
    "model.init_from": ["null", "no/such/folder"],
    "seq_len": [1, 32, 33, 64],
    "precision": ["fp32", "bf16", "fp16", "int8"],
    "activation_checkpointing": ["none", "selective", "full", "some"],
    "adapter": ["none", "lora", "dora"],
    "objective": ["next_token", "dpo"],
    "data.packing": ["concatenated", "best_fit", "tight"],
    "optim.lr": [0, 1e-3],
    "optim.target": ["null", "no.such:optimizer"],
    "launch.device": ["cpu", "null"],
    "stepps": [7],
    "steps": [0, 5],
}


def drawn(number: int) -> list[str]:
    chance = random.Random(number)
    keys = chance.sample(list(VALUES), chance.randint(2, 6))
    return [f"{key}={chance.choice(VALUES[key])}" for key in keys]


class Planned(Exception):
    """The settings were accepted."""


@pytest.fixture
def stops_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Accepted settings end both commands: nothing is tokenised, spawned or rehearsed."""

    def accepted(*_: object, **__: object) -> None:
        raise Planned

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("stoker.data.prepare", accepted)
    monkeypatch.setattr("stoker.launch.plan.make_plan", accepted)


@pytest.mark.parametrize("numbers", [range(first, 200, 20) for first in range(20 if FULL else 1)], ids=str)
def test_plan_and_train_refuse_the_same_settings_in_the_same_words(
    numbers: range, stops_at_the_start: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(command: str, words: list[str]) -> tuple[int, str]:
        try:
            status = main([command, *words])
        except Planned:
            status = 0
        return status, capsys.readouterr().err

    refused = 0
    for number in numbers:
        words = drawn(number)
        planned = said("plan", words)
        assert planned == said("train", words), words
        refused += planned[0] == 2
    assert refused > 0
    assert numbers.start or refused < len(numbers), "some of them start"
