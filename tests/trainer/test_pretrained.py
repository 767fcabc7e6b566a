"""Weights to begin with: on every layout the same ones, and nothing is taken that does not fit."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from stoker.conf.compose import compose
from stoker.conf.schema import Config, ModelConfig, to_dict
from stoker.conf.values import ConfigError
from stoker.launch.cli import main
from stoker.models.family import TRANSFORMERS, build_on_meta
from stoker.models.hugging_face import tensor_name
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.model import whole_model
from stoker.parallel.shards import PARAMETER, Shard
from stoker.trainer.facts import with_vocabulary
from stoker.trainer.parallelize import cut
from stoker.trainer.pretrained import adopt_shape, load_pretrained
from tests import world
from tests.launch.runs import overrides, write_text
from tests.models.families import write_family
from tests.parallel.reference import assemble
from tests.trainer.test_python_api import trained


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
    seeded = assemble(
        world.run(cut_only, 1, asked(tmp_path, "model.init_only=[layers.*.mlp.*]", "model.num_hidden_layers=2"))
    )
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
    with pytest.raises(ConfigError, match=message):
        asked(tmp_path, *more)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "qwen", "model_type='qwen': known are qwen"),
        ("attention_bias", True, "attention_bias=True"),
        ("hidden_act", "gelu", "hidden_act=gelu"),
        ("attention_dropout", 0.1, "attention_dropout=0.1: the decoder has attention_dropout=0.0"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("auto_map", {"AutoConfig": "theirs.Config"}, "auto_map.*code from its folder, which is not run"),
        ("configuration_files", ["config.4.0.0.json"], "configuration_files.*another file"),
        ("transformers_weights", "other.safetensors", "transformers_weights=other.safetensors"),
        ("per_layer_config", {"0": {"hidden_size": 8}}, "per_layer_config.*layers of different shapes"),
        ("hidden_size", "32", "transformers cannot read it"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 2.0}, "transformers cannot read it.*low_freq_factor"),
        ("rope_parameters", {"rope_theta": 1e4, "factor": 2.0}, "factor=2.0, which rope_type=default does not have"),
        (
            "rope_parameters",
            {"rope_type": "dynamic", "factor": 2.0},
            "rope_type='dynamic': known are default, linear, llama3, yarn",
        ),
    ],
)
def test_an_architecture_that_ours_is_not_is_refused_before_any_rank(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    write_family(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=message):
        asked(tmp_path, "model.native=true")


def test_what_the_decoder_does_not_compute_is_trained_in_transformers_own_modules(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    model = asked(tmp_path).model
    assert (model.target, model.config["hidden_act"], model.num_hidden_layers) == (TRANSFORMERS, "gelu", 3)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "silu"}))
    assert asked(tmp_path).model.target == ModelConfig().target
    assert asked(tmp_path, "model.native=false").model.target == TRANSFORMERS


@pytest.mark.parametrize("case", ["smollm3", "granite", "olmo2", "phi3", "gemma3"])
def test_a_case_of_the_decoder_is_trained_in_transformers_own_modules_where_asked(case: str, tmp_path: Path) -> None:
    write_family(tmp_path, case)
    assert asked(tmp_path).model.target == ModelConfig().target
    assert asked(tmp_path, "model.native=false").model.target == TRANSFORMERS


def test_an_older_config_json_means_the_same(tmp_path: Path) -> None:
    write_family(tmp_path, "llama with scaled rotary")
    new = asked(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(values))
    assert asked(tmp_path).model == new.model
    assert new.model.rope_parameters.factor == 8.0


def test_a_directory_that_holds_no_model_is_refused_before_any_rank(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"init_from=/not/there: there is no such directory"):
        asked(Path("/not/there"))
    with pytest.raises(ConfigError, match="neither a Hugging Face model nor a run"):
        asked(tmp_path)
    write_family(tmp_path, "llama")
    weights = (tmp_path / "model.safetensors").rename(tmp_path / "model_ema.safetensors")
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor.*; model_ema\.safetensors are not read"):
        asked(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        asked(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{}")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        asked(tmp_path)


def test_the_file_that_transformers_reads_counts_and_no_other(tmp_path: Path) -> None:
    reference = write_family(tmp_path, "llama").state_dict()
    zeros = {name: torch.zeros_like(value) for name, value in reference.items()}
    save_file(zeros, tmp_path / "model_ema.safetensors")  # sorts last
    save_file(zeros, tmp_path / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(zeros, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))  # of an earlier save
    found = assemble(world.run(begun, 1, asked(tmp_path)))
    assert all(torch.equal(value, reference[tensor_name(name)]) for name, value in found.items())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "../theirs/a.safetensors",
            r"the file of .* is '\.\./theirs/a\.safetensors': not a \.safetensors file",
        ),
        ("/etc/a.safetensors", "'/etc/a.safetensors': not a .safetensors file of this folder"),
        (7, "is 7: not a .safetensors file"),
        ("pytorch_model.bin", "not a .safetensors file of this folder"),
        ("c.safetensors", "names c.safetensors, not there"),
        ("b.safetensors", r"lm_head\.weight is in a\.safetensors, not in b\.safetensors"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(file: object, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    reference = write_family(folder, "llama").state_dict()
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"extra": torch.zeros(1)}, folder / "b.safetensors")
    weight_map = {**dict.fromkeys(reference, "a.safetensors"), "extra": "b.safetensors", "lm_head.weight": file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match=message):
        asked(folder)


def test_tensors_too_many_or_quantised_or_held_twice_are_named(tmp_path: Path) -> None:
    reference = write_family(tmp_path, "llama").state_dict()
    reference = {name: value.clone() for name, value in reference.items()}
    file = tmp_path / "model.safetensors"
    save_file({**reference, "score.weight": torch.zeros(1, 32)}, file)
    with pytest.raises(ConfigError, match=r"score\.weight is not in this model"):
        asked(tmp_path)
    norm = {"model.norm.weight": torch.ones(32, dtype=torch.int8)}
    save_file(reference | norm, file)
    with pytest.raises(ConfigError, match=r"norm\.weight is I8: quantised"):
        asked(tmp_path)
    file.rename(tmp_path / "a.safetensors")
    save_file(norm, tmp_path / "b.safetensors")
    index = {"weight_map": {**dict.fromkeys(reference, "a.safetensors"), "model.norm.weight": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"a\.safetensors both hold model\.norm\.weight"):
        asked(tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype", "problem"),
    [
        ("layers.0.calls", torch.float32, r"layers\.0\.calls is F32, the model's buffer is I64"),
        ("layers.0.calls", torch.int32, r"layers\.0\.calls is I32, the model's buffer is I64"),
        ("layers.0.seen", torch.int64, r"layers\.0\.seen is I64, the model's buffer is F32"),
        ("layers.0.norm.weight", torch.int64, r"layers\.0\.norm\.weight is I64: quantised"),
        ("layers.0.seen", torch.float16, None),
    ],
)
def test_a_buffer_is_not_taken_from_a_tensor_that_would_change_its_values(
    name: str, dtype: torch.dtype, problem: str | None, tmp_path: Path
) -> None:
    more = ["model.target=tests.parallel.odd_models:Remembering", "model.vocab_size=320", "model.hidden_size=16"]
    model = build_on_meta(compose(more).model, whole_model(compose(more).model.num_hidden_layers))
    tensors = {key: torch.zeros_like(value, device="cpu") for key, value in model.state_dict().items()}
    save_file(tensors | {name: tensors[name].to(dtype)}, tmp_path / "model.safetensors")
    values = {"model_type": "stoker", "model": to_dict(compose(more))["model"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with nullcontext() if problem is None else pytest.raises(ConfigError, match=problem):
        asked(tmp_path, *more)


def test_an_adapter_beside_the_model_is_not_left_out_unseen(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter"):
        asked(tmp_path)


@pytest.mark.parametrize("factor", [1.0, 2.0], ids=["equal to the embedding", "different"])
def test_a_tied_config_with_a_head_in_the_file_is_untied_if_they_differ(factor: float, tmp_path: Path) -> None:
    reference = dict(write_family(tmp_path, "tied llama without groups").state_dict())
    embedding = reference["model.embed_tokens.weight"].clone()
    reference |= {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding * factor}
    save_file(reference, tmp_path / "model.safetensors")
    config = asked(tmp_path)
    assert config.model.tie_word_embeddings is (factor == 1.0)
    found = assemble(world.run(begun, 1, config))
    assert torch.equal(found.get("head.weight", found["embedding.weight"]), reference["lm_head.weight"])
    if factor != 1.0:
        with pytest.raises(ConfigError, match=r"lm_head\.weight is not in this model"):
            asked(tmp_path, "model.tie_word_embeddings=true")


def test_rope_theta_beside_rope_parameters_counts_where_they_have_none(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(values | {"rope_theta": 500000.0}))
    assert asked(tmp_path).model.rope_parameters.rope_theta == 500000.0


def test_a_window_is_read_or_refused_wherever_it_is_used(tmp_path: Path) -> None:
    write_family(tmp_path, "mistral", sliding_window=16)
    assert asked(tmp_path).model.sliding_window == 16
    write_family(tmp_path, "mistral")  # whose class has a window of 4096, if config.json has none
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "sliding_window"}))
    assert asked(tmp_path).model.sliding_window == 4096
    write_family(tmp_path, "qwen2", sliding_window=16, use_sliding_window=False)
    asked(tmp_path)
    write_family(tmp_path, "qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=3)
    asked(tmp_path)  # no layer uses it
    write_family(tmp_path, "qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=2)
    with pytest.raises(ConfigError, match="sliding_window=16"):
        asked(tmp_path, "model.native=true")


@pytest.mark.long
def test_a_run_begins_with_the_weights_of_another_run_and_then_needs_it_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text")
    first, second = tmp_path / "first", tmp_path / "second"
    bpe = ["data.tokenizer=bpe", "data.bpe_vocab=300"]
    words = overrides(first, text, "steps=2", "batch.micro_size=8", f"data.cache={tmp_path / 'cache'}", *bpe)
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
    shown = capsys.readouterr().out
    assert "hidden_size: 32" in shown and f"tokenizer: {first}/tokenizer" in shown
    assert world.run(trained, 1, [*again, "steps=1"], fresh=True) == [("completed", 1)]
    from stoker.checkpoint import read_tensors

    ours = dict(read_tensors(second / "checkpoints" / "step-00000001"))
    for name, value in read_tensors(first / "checkpoints" / "step-00000002"):
        assert torch.equal(ours[name], value), name
    shutil.rmtree(first)
    assert world.run(trained, 1, [f"run.dir={second}", "steps=2", "run.change=true"], fresh=True) == [("completed", 2)]
