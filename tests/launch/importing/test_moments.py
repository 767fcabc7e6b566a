"""A run that begins with another program's weights and moments goes on as that program would have."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from stoker.checkpoint.commit import newest
from stoker.checkpoint.reader import load
from stoker.checkpoint.stored import open_checkpoint, state_of
from stoker.conf.compose import compose
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.launch.cli import main
from stoker.models.hugging_face import tensor_name
from stoker.models.hugging_face_weights import open_weights
from stoker.parallel.layout import batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import Shard, whole
from stoker.trainer.facts import with_vocabulary
from stoker.trainer.parallelize import cut
from stoker.trainer.pretrained import adopt_shape, load_pretrained
from stoker.trainer.pretrained_moments import load_moments, refuse_unfitting_moments
from tests import world
from tests.launch.importing.sources import torchtitan_state
from tests.launch.runs import train_here, write_text
from tests.models.families import write_family
from tests.parallel.reference import assemble, normwise
from tests.trainer.test_against_peft import LENGTH, ROWS, rows_of

BEFORE, AFTER = 3, 3
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
NAMES = ("exp_avg", "exp_avg_sq")


class Plain:
    """transformers' model in a loop of torch's."""

    def __init__(self, model: Any) -> None:
        self.model, self.steps = model.float().train(), 0
        self.optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.steps += 1
            rows = rows_of(self.steps)
            logits = self.model(input_ids=rows.tokens).logits.flatten(0, 1)
            self.optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, rows.labels.flatten(), ignore_index=-100).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()

    def moments(self, key: str) -> Any:
        """The model with the moments in the places of its weights."""
        held = copy.deepcopy(self.model)
        with torch.no_grad():
            for into, parameter in zip(held.parameters(), self.model.parameters(), strict=True):
                into.copy_(self.optimizer.state[parameter][key])
        return held


def write_torchtitan(folder: Path, plain: Plain, edit: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """As torchtitan's checkpoint manager: the model's state dict and the optimizer's, both flat."""
    states: dict[str, Any] = {}
    for key in NAMES:
        for name, value in torchtitan_state(plain.moments(key)).items():
            states[f"state.{name}.{key}"] = value
            states[f"state.{name}.step"] = torch.tensor(float(plain.steps))
            states[f"param_groups.{name}.lr"] = SETTINGS["lr"]
    edit(states)
    dcp.save({**torchtitan_state(plain.model), "optimizer": states}, checkpoint_id=folder, no_dist=True)


def write_torch(folder: Path, plain: Plain) -> None:
    """As torch's tutorial of DCP: `get_optimizer_state_dict` below a key."""
    states = get_optimizer_state_dict(plain.model, plain.optimizer, options=StateDictOptions())
    dcp.save({"model": plain.model.state_dict(), "optim": states}, checkpoint_id=folder, no_dist=True)


CASES: dict[str, tuple[str, Callable[[Path, Plain], None], list[str]]] = {
    "torchtitan's Llama, ZeRO 3": ("llama", write_torchtitan, ["parallel.zero=3"]),
    "torchtitan's Qwen3, pp 2": ("qwen3", write_torchtitan, ["parallel.pp=2", "batch.micro_size=1"]),
    "torch's tied Qwen2, tp 2": ("tied qwen2", write_torch, ["parallel.tp=2"]),
    "torch's Phi-3, whose projections are fused, DeepSpeed": ("phi3", write_torch, ["parallel.engine=deepspeed"]),
    "torch's Qwen2, in transformers' modules, tp 2": (
        "qwen2",
        write_torch,
        ["model.native=false", "parallel.tp=2", "parallel.sequence_parallel=false"],
    ),
}


def imported(folder: Path, case: str, write: Callable[[Path, Plain], None], *words: str) -> Plain:
    """`folder/out` of a model that was trained for some steps. It has been trained further since."""
    plain = Plain(write_family(folder / "hf", case))
    plain.train(BEFORE)
    write(folder / "source", plain)
    (folder / "source" / "config.json").write_bytes((folder / "hf" / "config.json").read_bytes())
    assert main(["import", str(folder / "source"), str(folder / "out"), "--shard-size", "40KB", *words]) == 0
    plain.train(AFTER)
    return plain


def asked(folder: Path, *more: str) -> Config:
    words = [
        f"model.init_from={folder}", f"optim.init_from={folder}", f"batch.size={ROWS}", f"seq_len={LENGTH}",
        "precision=fp32", "optim.eps=1e-6", "optim.decay_all=true", f"optim.lr={SETTINGS['lr']}", *more,
    ]  # fmt: skip
    return with_vocabulary(adopt_shape(compose(words), words))


def go_on(config: Config) -> tuple[list[Shard], dict[str, float]]:
    """On a rank: the steps after the import."""
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    load_pretrained(config, engine.shards())
    load_moments(config, engine)
    engine.shards_written()
    for step in range(BEFORE + 1, BEFORE + AFTER + 1):
        engine.forward_backward(rows_of(step)[mesh.dp_rank :: layout.dp])
        engine.update(config.optim.lr)
    return [replace(shard, data=shard.data.clone()) for shard in engine.shards()], engine.state()


SHORT = ("torchtitan's Llama, ZeRO 3", "torch's tied Qwen2, tp 2")


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in SHORT else pytest.mark.long) for c in CASES])
def test_a_run_goes_on_as_the_other_program_does(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family, write, words = CASES[case]
    plain = imported(tmp_path, family, write)
    line = capsys.readouterr().err
    assert f"AdamW's moments after {BEFORE} updates" in line and "not imported" not in line
    fresh = "parallel.engine=deepspeed" in words  # it keeps globals
    found = world.run(go_on, 2, asked(tmp_path / "out", *words), timeout=120.0, fresh=fresh)
    assert all(state["step"] == BEFORE + AFTER for _, state in found)
    for kind, expected in (("param", plain.model), *((f"optim.{key}", plain.moments(key)) for key in NAMES)):
        values = dict(expected.named_parameters())
        ours = assemble([shards for shards, _ in found], kind)
        assert len(ours) == len(values) or family == "phi3"
        for name, value in ours.items():
            assert normwise(value, of_name(values, name, value)) < 1e-5, f"{kind} {name}"


def of_name(values: dict[str, torch.Tensor], name: str, ours: torch.Tensor) -> torch.Tensor:
    """The parameter of transformers' model, or the rows of it, that are ours of this name."""
    theirs = name if name in values else tensor_name(name)
    if theirs in values:
        return values[theirs]
    fused, rows = next(
        (theirs.replace(part, whole), first)
        for part, whole, first in (
            ("q_proj", "qkv_proj", 0), ("k_proj", "qkv_proj", 32), ("v_proj", "qkv_proj", 48),
            ("gate_proj", "gate_up_proj", 0), ("up_proj", "gate_up_proj", 48),
        )
        if part in theirs and theirs.replace(part, whole) in values
    )  # fmt: skip
    return values[fused][rows : rows + ours.shape[0]]


def test_a_whole_run_begins_with_the_moments(tmp_path: Path) -> None:
    imported(tmp_path, "llama", write_torchtitan)
    write_text(tmp_path / "text")
    train_here(
        tmp_path,
        [
            f"run.dir={tmp_path / 'run'}", f"model.init_from={tmp_path / 'out'}", f"optim.init_from={tmp_path / 'out'}",
            "data=text", f"data.path={tmp_path / 'text'}", "seq_len=64", "batch.size=4", "steps=1", "launch.nproc=2",
            "optim.betas=[0.9999999,0.9999999]",  # moments stay what they were
        ],
    )  # fmt: skip
    stored = open_checkpoint(newest(RunDirectory(tmp_path / "run").checkpoints)[0])
    assert state_of(stored.path, stored.manifest)["engine"]["step"] == BEFORE + 1
    for key in NAMES:
        with open_weights(tmp_path / "out" / "optimizer" / key) as expected:
            for name, tensor in expected.items():
                ours = next(ours for kind, ours in stored.tensors if tensor_name(ours) == name)
                found = torch.empty(tensor.shape)
                load(stored, [Shard(ours, f"optim.{key}", tensor.shape, whole(tensor.shape), found)])
                assert normwise(found, tensor.read(whole(tensor.shape))) < 1e-3, f"{key} {name}"


def test_what_is_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(tmp_path, "llama", write_torchtitan, "--no-optimizer")
    assert "not imported: optimizer" in capsys.readouterr().err
    assert not (tmp_path / "out" / "optimizer").exists()


def without_a_parameter(states: dict[str, Any]) -> None:
    for key in (*NAMES, "step"):
        del states[f"state.norm.weight.{key}"]


STRANGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a parameter without": (
        without_a_parameter,
        "not imported: optimizer (model.norm.weight of exp_avg is missing, too much or of another shape)",
    ),
    "a moment without": (lambda states: states.pop("state.norm.weight.exp_avg"), "not imported: optimizer"),
    "AMSGrad": (
        lambda states: states.update({"state.norm.weight.max_exp_avg_sq": torch.ones(32)}),
        "not imported: optimizer",
    ),
    "other counts": (lambda states: states.update({"state.norm.weight.step": torch.tensor(7.0)}), "not imported: opti"),
    "a number for a name": (
        lambda states: states.update(
            {f"state.0.{key}": states[f"state.norm.weight.{key}"] for key in (*NAMES, "step")}
        ),
        "not imported: optimizer (0: a model of torchtitan's of Llama's kind has no such tensor)",
    ),
    "a half count": (
        lambda states: states.update({name: torch.tensor(2.5) for name in states if name.endswith(".step")}),
        "not imported: optimizer",
    ),
    "a shape": (
        lambda states: states.update({"state.norm.weight.exp_avg": torch.ones(31)}),
        "not imported: optimizer (model.norm.weight of exp_avg is missing, too much or of another shape)",
    ),
}


@pytest.mark.parametrize("case", STRANGE)
def test_moments_that_are_not_adamw_s_of_all_parameters_are_left_out_and_told(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, message = STRANGE[case]
    imported(tmp_path, "llama", functools.partial(write_torchtitan, edit=edit))
    line = capsys.readouterr().err
    assert message in line and "AdamW's moments after" not in line
    assert not (tmp_path / "out" / "optimizer").exists()


@pytest.mark.parametrize("name", ["step", "exp_avg"])
def test_damaged_moments_end_the_import_with_the_advice_to_leave_them(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported(tmp_path, "llama", write_torchtitan)
    source = tmp_path / "source"
    stored = dcp.FileSystemReader(source).read_metadata().storage_data
    place = next(place for index, place in stored.items() if index.fqn == f"optimizer.state.norm.weight.{name}")
    with open(source / place.relative_path, "r+b") as file:
        file.seek(place.offset)
        file.write(b"x" * place.length)
    capsys.readouterr()
    assert main(["import", str(source), str(tmp_path / "again")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"norm.weight.{name}" in line and line.endswith("(--no-optimizer leaves AdamW's moments out)")
    assert not (tmp_path / "again").exists()
    assert main(["import", str(source), str(tmp_path / "again"), "--no-optimizer"]) == 0


def test_moments_of_another_model_or_of_none_are_refused(tmp_path: Path) -> None:
    imported(tmp_path, "llama", write_torchtitan)
    folder, out = tmp_path / "out" / "optimizer", tmp_path / "out"
    refuse_unfitting_moments(asked(out))
    imported(tmp_path / "other", "mistral", write_torch)
    for other, message in (
        ("other/out", r"exp_avg: layers\.0\.attention\.\w+\.weight has shape"),
        ("hf", "there is no .*hf/optimizer, which `stoker import` makes"),
    ):
        with pytest.raises(ConfigError, match=message):
            refuse_unfitting_moments(asked(out, f"optim.init_from={tmp_path / other}"))
    (folder / "optimizer.json").write_text('{"step": 0}')
    with pytest.raises(ConfigError, match="step is 0, not a count of updates"):
        refuse_unfitting_moments(asked(out))
    (folder / "exp_avg").rename(folder / "other")
    (folder / "optimizer.json").write_text('{"step": 3}')
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        refuse_unfitting_moments(asked(out))
