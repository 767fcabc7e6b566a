"""Checkpoints of other programs come in as the model that they hold, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from stoker.launch.cli import main
from stoker.models.hugging_face_config import parsed
from stoker.trainer.import_check import load_theirs
from tests.launch.importing.compared import assert_computes_the_same
from tests.launch.importing.sources import torchtitan_state, write_bin, write_deepspeed, write_litgpt, write_torchtitan
from tests.test_golden_runs import copied

WRITTEN: dict[str, Callable[[Path], Any]] = {
    "pytorch_model.bin": lambda folder: write_bin(folder, "llama with scaled rotary"),
    "pytorch_model.bin of a tied Qwen2 in three files": lambda folder: write_bin(folder, "tied qwen2", files=3),
    "litgpt": lambda folder: write_litgpt(folder, "llama with scaled rotary"),
    "litgpt, interleaved": lambda folder: write_litgpt(folder, "llama", interleaved=True),
    "litgpt, Qwen2 interleaved below model": lambda folder: write_litgpt(folder, "qwen2", True, "model"),
    "litgpt, Qwen3": lambda folder: write_litgpt(folder, "qwen3"),
    "torchtitan": lambda folder: write_torchtitan(folder, "llama with scaled rotary"),
    "torchtitan, below model": lambda folder: write_torchtitan(folder, "llama", "model"),
    "torchtitan, Qwen3": lambda folder: write_torchtitan(folder, "qwen3"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_comes_in_computes_what_the_source_computes_and_trains(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = WRITTEN[case](tmp_path / "source")
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "out"), "--shard-size", "40KB"]) == 0
    assert "logits equal to the source's within" in capsys.readouterr().err
    assert_computes_the_same(model, tmp_path / "out")
    state = model.state_dict()
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        for name, value in load_file(path).items():
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_s_own_code_puts_its_files_together(
    stage: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_deepspeed(tmp_path / "source", "qwen2", stage)
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "out"), "--trust"]) == 0
    line = capsys.readouterr().err
    assert "logits equal to the source's within" in line and "not imported: optimizer state" in line
    state = model.state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in found.items())


def test_files_of_the_tokenizer_and_the_dtype_come_along(tmp_path: Path) -> None:
    write_bin(tmp_path / "source", "llama", dtype="bfloat16")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"dtype": "bfloat16"}
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_wrong_order_of_rotary_channels_is_found_by_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_torchtitan(tmp_path / "source", "llama")
    monkeypatch.setattr("stoker.launch.importing.torchtitan.to_halves", lambda value, heads: value)
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "out")]) == 1
    assert "as imported differ by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.unfinished").exists()


def test_what_goes_out_as_torchtitan_s_comes_in_bit_for_bit(tmp_path: Path) -> None:
    run = copied("indexed", tmp_path)
    assert main(["export", str(run.path), str(tmp_path / "hf")]) == 0
    assert main(["export", str(run.path), str(tmp_path / "dcp"), "--format", "dcp"]) == 0
    assert main(["import", str(tmp_path / "dcp"), str(tmp_path / "back")]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert after.keys() - before.keys() <= {"lm_head.weight"}  # of a tied model: torchtitan's state dict has both
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    theirs = load_theirs(tmp_path / "hf", parsed(tmp_path / "hf"))
    expected = torchtitan_state(theirs)
    state = {name: torch.zeros_like(value) for name, value in expected.items()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)  # as torchtitan does
    assert all(torch.equal(state[name], value) for name, value in expected.items())
