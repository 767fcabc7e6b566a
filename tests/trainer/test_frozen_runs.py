"""Runs in bf16 beside frozen weights of a base in fp32: what is saved, compared, resumed and exported of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stoker.checkpoint import open_checkpoint, read_state, read_tensors
from stoker.conf.rundir import RunDirectory
from stoker.launch.cli import main
from tests.adapted import adapter_run, checkpoint_of
from tests.launch.runs import assert_same_state, steps_of
from tests.models.families import write_family

FILE = "model.safetensors"
NO_ADAPTER = ["adapter=-", "adapter.rank=-", "adapter.target_modules=-"]
FREEZE = [*NO_ADAPTER, "model.freeze=[embedding,'*.mlp',norm]"]
NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "layers.1.mlp.down.weight": "model.layers.1.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base in fp32, whose numbers bf16 does not have."""
    home = tmp_path_factory.mktemp("frozen")
    write_family(home / "base", "tied qwen2")
    weights = load_file(home / "base" / FILE)
    assert not any(torch.equal(value, value.bfloat16().float()) for value in weights.values() if value.dim() > 1)
    return home


def test_digests_and_merges_are_of_the_files_whatever_is_held_of_them(home: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(home / "base", base)
    wide = adapter_run(tmp_path, "wide", base, "steps=2")
    run = adapter_run(tmp_path, "run", base, "precision=bf16")
    adapter_run(tmp_path, "resumed", base, "precision=bf16", "steps=2", "adapter.keep_base=true")
    shutil.rmtree(base)  # the kept files are read from here on
    resumed = adapter_run(tmp_path, "resumed", base, "precision=bf16")
    assert steps_of(resumed.path) == steps_of(run.path)
    assert_same_state(resumed.path, run.path)
    state = read_state(checkpoint_of(run))
    assert state["base"] == read_state(checkpoint_of(wide))["base"]
    tensors = open_checkpoint(checkpoint_of(run)).tensors.values()
    trained = sum(value.numel() for _, value in read_tensors(checkpoint_of(run)))
    assert {tensor.dtype for tensor in tensors} == {"F32"} and len(tensors) == 3 * 12
    size = sum(file.stat().st_size for file in checkpoint_of(run).iterdir())
    assert size <= 12.1 * trained + 1e6

    assert main(["export", str(resumed.path), str(tmp_path / "merged"), "--merge", "--dtype", "fp32"]) == 0
    before, after = load_file(home / "base" / FILE), load_file(tmp_path / "merged" / FILE)
    stored = dict(read_tensors(checkpoint_of(resumed)))
    for name, value in after.items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            number, module = name.split(".")[2], "attention.q" if "q_proj" in name else "mlp.down"
            a, b = (stored[f"layers.{number}.{module}.lora.{matrix}"] for matrix in "AB")
            assert torch.equal(value, before[name].addmm(b, a, alpha=4.0)), name  # alpha 16 / rank 4
        else:
            assert torch.equal(value, before[name]), name
    adapter_run(tmp_path, "resumed", base, "precision=fp32", "run.change=true", "steps=5")


def frozen_of(run: RunDirectory) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the parameters in NAMES."""
    return {name: value for name, value in read_tensors(checkpoint_of(run)) if name in NAMES}


def assert_rounded(run: RunDirectory, home: Path, dtype: torch.dtype, rounded: torch.dtype) -> None:
    """The frozen parameters in `run` are those of the base, `rounded` once, and stored in `dtype`."""
    base, found = load_file(home / "base" / FILE), frozen_of(run)
    for name, theirs in NAMES.items():
        assert found[name].dtype == dtype, name
        assert torch.equal(found[name], base[theirs].to(rounded).to(dtype)), name
    trained = dict(read_tensors(checkpoint_of(run), select=lambda name: name.endswith("attention.q.weight")))
    assert len(trained) == 3 and all(value.dtype == torch.float32 for value in trained.values())


@pytest.mark.long
def test_frozen_parameters_are_saved_as_they_are_held_and_resumed_in_any_precision(home: Path, tmp_path: Path) -> None:
    run = adapter_run(tmp_path, "run", home / "base", *FREEZE, "precision=bf16", "steps=2")
    assert_rounded(run, home, torch.bfloat16, torch.bfloat16)
    assert main(["generate", str(run.path), "--ids", "1,5", "--tokens", "2", "--greedy"]) == 0
    assert main(["export", str(run.path), str(tmp_path / "out")]) == 0
    out, base = load_file(tmp_path / "out" / FILE), load_file(home / "base" / FILE)
    assert all(torch.equal(out[name], base[name].bfloat16().float()) for name in NAMES.values())

    # One that held masters of them in fp32, as every run did once.
    before = adapter_run(tmp_path, "before", home / "base", *FREEZE, "steps=2")
    assert_rounded(before, home, torch.float32, torch.float32)
    narrower = adapter_run(tmp_path, "before", home / "base", *FREEZE, "steps=3", "precision=bf16", "run.change=true")
    assert_rounded(narrower, home, torch.bfloat16, torch.bfloat16)
    wider = adapter_run(tmp_path, "run", home / "base", *FREEZE, "steps=3", "precision=fp32", "run.change=true")
    assert_rounded(wider, home, torch.float32, torch.bfloat16)

    heir = adapter_run(tmp_path, "heir", narrower.path, *NO_ADAPTER, "steps=1", "optim=sgd", "optim.lr=1e-30")
    values = frozen_of(heir)
    assert all(value.dtype == torch.float32 for value in values.values())
    assert all(torch.equal(value.bfloat16(), frozen_of(narrower)[name]) for name, value in values.items())
