"""Weights to begin with: on every layout the same ones, and nothing is taken that does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from stoker.conf.compose import compose
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.launch.cli import main
from stoker.models.hugging_face import tensor_name
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import PARAMETER, Shard
from stoker.trainer.assemble import with_vocabulary
from stoker.trainer.parallelize import cut
from stoker.trainer.pretrained import adopt_shape, load_pretrained
from tests import world
from tests.launch.runs import overrides, write_text
from tests.models.families import write_family
from tests.parallel.reference import assemble
from tests.trainer.test_python_api import trained

pytest.importorskip("transformers")


def asked(folder: Path, *more: str) -> Config:
    words = [f"model.init_from={folder}", "seq_len=32", "batch.size=8", "precision=fp32", *more]
    return with_vocabulary(adopt_shape(compose(words), words))


def begun(config: Config) -> list[Shard]:
    """On a rank: the parameters that training would begin with."""
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    load_pretrained(config, engine.shards())
    return [shard for shard in engine.shards() if shard.kind == PARAMETER]


@pytest.mark.parametrize("layout", [Layout(dp_shard=2, tp=2, zero=3), Layout(pp=2, tp=2), Layout(4)], ids=str)
def test_every_layout_begins_with_the_weights_of_the_files(layout: Layout, tmp_path: Path) -> None:
    reference = write_family(tmp_path, "tied qwen2").state_dict()
    words = [
        f"parallel.tp={layout.tp}",
        f"parallel.pp={layout.pp}",
        f"parallel.zero={layout.zero}",
        "batch.micro_size=2",
    ]
    found = assemble(world.run(begun, 4, asked(tmp_path, *words)))
    assert {tensor_name(name) for name in found} == set(reference) - {"lm_head.weight"}
    for name, value in found.items():
        assert torch.equal(value, reference[tensor_name(name)]), name


def test_only_some_parameters_can_be_taken(tmp_path: Path) -> None:
    reference = write_family(tmp_path, "llama").state_dict()
    taken = assemble(
        world.run(begun, 1, asked(tmp_path, "model.init_only=[layers.*.mlp.*]", "model.num_hidden_layers=2"))
    )
    seeded = assemble(world.run(cut_only, 1, asked(tmp_path, "model.num_hidden_layers=2")))
    for name, value in taken.items():
        from_file = torch.equal(value, reference[tensor_name(name)])
        assert from_file if ".mlp." in name else torch.equal(value, seeded[name]), name


def cut_only(config: Config) -> list[Shard]:
    layout = layout_of(config, 1)
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    return [shard for shard in cut(config, mesh, batch_plan(config, layout)).shards() if shard.kind == PARAMETER]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.num_hidden_layers=2"], "layers.2.*is not in this model"),
        (["model.num_hidden_layers=4"], "layers.3.attention.k.weight is missing"),
        (["model.intermediate_size=64"], r"layers.0.mlp.gate.weight has shape \(48, 32\), the model's has \(64, 32\)"),
        (["model.init_only=[blocks.*]"], "fits no parameter, such as embedding.weight"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(more: list[str], message: str, tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    with pytest.raises(AssertionError, match=message):
        world.run(begun, 1, asked(tmp_path, *more))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "gpt2", "known are llama, mistral, qwen2, qwen3"),
        ("attention_bias", True, "attention_bias=True"),
        ("hidden_act", "gelu", "hidden_act=gelu"),
        ("sliding_window", 16, "sliding_window=16.*seq_len=16 works"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "rope_type='yarn'"),
    ],
)
def test_an_architecture_that_ours_is_not_is_refused_before_any_rank(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    write_family(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=message):
        asked(tmp_path)


def test_an_older_config_json_says_the_same(tmp_path: Path) -> None:
    write_family(tmp_path, "llama with scaled rotary")
    new = asked(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(values))
    assert asked(tmp_path).model == new.model
    assert new.model.rope_scaling.factor == 8.0


def test_a_directory_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a Hugging Face model nor a run"):
        asked(tmp_path)
    write_family(tmp_path, "llama")
    config = asked(tmp_path)
    weights = (tmp_path / "model.safetensors").rename(tmp_path / "moved")
    with pytest.raises(AssertionError, match=r"no \.safetensors file"):
        world.run(begun, 1, config)
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AssertionError, match=r"model\.safetensors cannot be read"):
        world.run(begun, 1, config)


def test_a_run_begins_with_the_weights_of_another_run_and_then_needs_it_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text")
    first, second = tmp_path / "first", tmp_path / "second"
    words = overrides(first, text, "steps=2", "batch.micro_size=8", f"data.cache={tmp_path / 'cache'}")
    assert world.run(trained, 1, words, fresh=True) == [("completed", 2)]
    again = [
        *(
            f"run.dir={second}",
            f"model.init_from={first}",
            "data=text",
            f"data.path={text}",
            "optim=sgd",
            "optim.lr=1e-30",
            "seq_len=32",
        ),
        *("batch.size=8", "precision=fp32", f"data.cache={tmp_path / 'cache'}"),
    ]
    assert main(["config", *again]) == 0
    assert "width: 32" in capsys.readouterr().out
    assert world.run(trained, 1, [*again, "steps=1"], fresh=True) == [("completed", 1)]
    from stoker.checkpoint import read_tensors

    ours = dict(read_tensors(second / "checkpoints" / "step-00000001"))
    for name, value in read_tensors(first / "checkpoints" / "step-00000002"):
        assert torch.equal(ours[name], value), name
    shutil.rmtree(first)
    assert world.run(trained, 1, [f"run.dir={second}", "steps=2", "run.change=true"], fresh=True) == [("completed", 2)]
