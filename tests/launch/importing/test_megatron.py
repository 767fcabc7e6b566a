"""Checkpoints of Megatron's come in as the model that they hold, or not at all."""

from __future__ import annotations

import argparse
import fractions
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stoker.launch.cli import main
from stoker.launch.importing import megatron
from tests.launch.importing.compared import assert_computes_the_same
from tests.launch.importing.megatron_sources import STEP, arguments, save, write_megatron, write_torch_dist
from tests.launch.importing.test_refused import Runs, refused

WRITTEN: dict[str, Callable[[Path], Any]] = {
    "llama": lambda folder: write_megatron(folder, "llama"),
    "tied qwen2 of 2 tensor ranks": lambda folder: write_megatron(folder, "tied qwen2", tensor=2, fused_norms=False),
    "qwen3 of 2 x 3 ranks": lambda folder: write_megatron(folder, "qwen3", tensor=2, stages=3),
    "tied llama of 3 stages": lambda folder: write_megatron(folder, "tied llama without groups", tensor=4, stages=3),
    "torch_dist": lambda folder: write_torch_dist(folder, "qwen3"),
    "torch_dist, tied": lambda folder: write_torch_dist(folder, "tied qwen2"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_checkpoint_of_megatron_computes_what_it_computed_there(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = WRITTEN[case](tmp_path / "source")
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    line = capsys.readouterr().err
    assert "logits equal to the source's within" in line and f"{STEP} of Megatron in" in line
    assert "not imported: " in line and "optimizer" in line
    assert_computes_the_same(model, tmp_path / "out")
    state = model.state_dict()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == set(state) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    assert all(torch.equal(value, state[name]) for name, value in written.items())


def test_a_config_json_gives_the_vocabulary_and_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_megatron(tmp_path / "source", "llama")
    edit_arguments(tmp_path / "source", vocab_size=None)
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "padded")]) == 0
    assert json.loads((tmp_path / "padded" / "config.json").read_text())["vocab_size"] == 344
    theirs = tmp_path / "source-model" / "config.json"
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "out"), "--config", str(theirs)]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].shape == (320, 32)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], model.lm_head.weight)
    capsys.readouterr()
    values = json.loads(theirs.read_text())
    theirs.write_text(json.dumps(values | {"num_key_value_heads": 4}))
    line = refused(tmp_path / "source", tmp_path / "other", capsys, "--config", str(theirs))
    assert "args make num_key_value_heads=2 of the model, --config has 4" in line


def edit_arguments(folder: Path, **changes: Any) -> None:
    """Changes arguments in the files of all ranks."""
    for path in folder.rglob("model_optim_rng.pt"):
        held = megatron.held_in(path, False, megatron.RECORDS)
        given = argparse.Namespace(**plain(held["args"]) | changes)
        save(path, {"args": given, "model": tensors(held), "checkpoint_version": 3.0, "iteration": 100})


def plain(args: Any) -> dict[str, Any]:
    """Without those that are records."""
    return {key: value for key, value in vars(args).items() if key not in ("model_type", "exit_signal", "save")}


def tensors(held: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() for name, value in held["model"].items() if isinstance(value, torch.Tensor)}


def edit(path: Path, change: Callable[[dict[str, Any]], None], **others: Any) -> None:
    """Changes the tensors of a file, or what it holds beside them."""
    held = megatron.held_in(path, False, megatron.RECORDS)
    model = tensors(held)
    change(model)
    args = argparse.Namespace(**plain(held["args"]))
    held = {"args": args, "model": model, "checkpoint_version": 3.0, "iteration": 100} | others
    save(path, {key: value for key, value in held.items() if value is not None})


def rank(folder: Path, name: str) -> Path:
    return folder / STEP / name / "model_optim_rng.pt"


QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
NORM = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing rank": (lambda f: shutil.rmtree(f / STEP / "mp_rank_01"), "has no mp_rank_01/model_optim_rng.pt"),
    "a file of another model": (
        lambda f: edit(rank(f, "mp_rank_01"), lambda held: None, iteration=99),
        "is of another model or iteration than",
    ),
    "a tensor that a rank lacks": (
        lambda f: edit(rank(f, "mp_rank_01"), lambda held: held.pop(QKV)),
        f"{QKV} is held by 1 of 2 tensor ranks",
    ),
    "a copy that differs": (
        lambda f: edit(rank(f, "mp_rank_01"), lambda held: held[NORM].add_(1)),
        f"{NORM} differs from that of",
    ),
    "rows of other heads": (
        lambda f: edit_arguments(f, num_query_groups=4),
        "self_attention.linear_qkv.weight has shape (32, 32); args make 48 rows of it",
    ),
    "an unknown tensor": (
        lambda f: [edit(rank(f, name), lambda held: held.update({"decoder.lora": torch.ones(1)})) for name in RANKS],
        "decoder.lora: a model of Megatron of Llama's kind has no such tensor",
    ),
    "a vocabulary that is larger": (lambda f: edit_arguments(f, vocab_size=400), "and the vocabulary 400 tokens"),
    "another activation": (lambda f: edit_arguments(f, swiglu=False), "have swiglu=False: models with swiglu=True are"),
    "experts": (lambda f: edit_arguments(f, num_experts=8), "args have num_experts=8: models with num_experts=None"),
    "stages of unequal length": (
        lambda f: edit_arguments(f, decoder_first_pipeline_num_layers=2),
        "args have decoder_first_pipeline_num_layers=2",
    ),
    "interleaved stages": (
        lambda f: edit(rank(f, "mp_rank_00"), lambda held: None, model0={}),
        "holds model0: checkpoints of interleaved pipelines are not imported",
    ),
    "an old order of queries": (
        lambda f: edit(rank(f, "mp_rank_00"), lambda held: None, checkpoint_version=2.0),
        "checkpoint_version=2.0: 3.0 is read",
    ),
    "names before the core": (
        lambda f: edit(rank(f, "mp_rank_00"), lambda held: None, model={"language_model": {}}),
        "has the names of Megatron before its core",
    ),
    "no model": (lambda f: edit(rank(f, "mp_rank_00"), lambda held: None, model=None), "holds no model"),
    "no arguments": (lambda f: torch.save({"model": {}}, rank(f, "mp_rank_00")), "holds no args"),
    "an iteration that is not there": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("../elsewhere"),
        "names '../elsewhere', which is no iteration beside it",
    ),
    "a file that is cut short": (
        lambda f: rank(f, "mp_rank_01").write_bytes(rank(f, "mp_rank_01").read_bytes()[:-400]),
        "mp_rank_01/model_optim_rng.pt is damaged or cut short",
    ),
}
RANKS = ("mp_rank_00", "mp_rank_01")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron") / "source"
    write_megatron(folder, "llama", tensor=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_nearly_right_checkpoint_of_megatron_is_refused_in_one_line(
    case: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = CASES[case]
    shutil.copytree(source, tmp_path / "source")
    damage(tmp_path / "source")
    capsys.readouterr()
    assert message in refused(tmp_path / "source", tmp_path / "out", capsys)


def test_a_stack_of_other_layers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_torch_dist(tmp_path / "source", "llama")
    held = {"args": arguments(model, num_layers=4)}
    save(tmp_path / "source" / STEP / "common.pt", held)
    capsys.readouterr()
    line = refused(tmp_path / "source", tmp_path / "out", capsys)
    assert ".metadata: decoder.layers." in line and ": args have num_layers=4" in line


def test_code_in_the_pickle_of_a_rank_does_not_run(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source, tmp_path / "source")
    path = rank(tmp_path / "source", "mp_rank_00")
    model = tensors(megatron.held_in(path, False, megatron.RECORDS))  # copies: the file is mapped
    torch.save({"model": model, "args": Runs(tmp_path / "made")}, path)
    line = refused(tmp_path / "source", tmp_path / "out", capsys)
    assert f"{os.mkdir.__module__}.mkdir" in line and "--trust unpickles it" in line
    torch.save({"model": model, "args": fractions.Fraction(1, 2), "checkpoint_version": 3.0}, path)
    assert "args are Fraction: those of Megatron's" in refused(tmp_path / "source", tmp_path / "out", capsys, "--trust")
    assert not (tmp_path / "made").exists()


def test_a_wrong_order_of_queries_is_found_by_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_after_the_other(value: Any, model: Any, fused_qkv: bool, number: int) -> Any:
        return value.split(model.rows_of_qkv)[number] if fused_qkv else value.chunk(2)[number]

    write_megatron(tmp_path / "source", "llama")
    capsys.readouterr()
    monkeypatch.setattr(megatron, "_projection", one_after_the_other)
    assert "as imported differ by" in refused(tmp_path / "source", tmp_path / "out", capsys)
