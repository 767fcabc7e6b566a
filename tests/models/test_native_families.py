"""The decoder's families against transformers' own models: logits, gradients, files and generation.

transformers' model is given one document at a time, so that it needs no mask.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from stoker.conf.schema import ModelConfig, RopeParameters
from stoker.models.cache import Cache
from stoker.models.decoder import Decoder, build
from stoker.models.hugging_face_families import family_of
from stoker.models.hugging_face_weights import open_weights
from stoker.models.transformers_family import TransformersFamily
from stoker.parallel.model import whole_model
from stoker.parallel.shards import Chunk, whole
from tests.models.families import VOCABULARY, write_family
from tests.models.tiny import gradients, shape

LATENTS = ["deepseek_v3", "deepseek_v3 without a latent of queries", "deepseek_v3 with yarn", "qwen3 with yarn"]
WINDOWS = [
    "phi3",
    "phi3 without a window",
    "phi3 with factors",
    "gemma3",
    "gemma3 of full attention",
    "mistral with a window",
]
DENSE = ["smollm3", "granite", "olmo2", "llama with linear rotary", *WINDOWS]
CASES = [*DENSE, "qwen3_moe", "qwen3_moe with a dense layer", "mixtral", "olmoe", *LATENTS]
GEMMA = {
    "qk_norm": True,
    "norm_placement": "both",
    "zero_centered_norm": True,
    "hidden_act": "gelu_pytorch_tanh",
    "embedding_multiplier": 32**0.5,
}
DOCUMENTS = [[7, 9, 4], [1, 12, 7], [20]]  # lengths, by row
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def imported(folder: Path) -> tuple[ModelConfig, Decoder]:
    """The decoder of a model folder, as an import reads it."""
    config = imported_shape(folder)
    model = build(config, whole_model(config.num_hidden_layers))
    assert isinstance(model, Decoder)
    held = tensors_of(model)
    with open_weights(folder) as tensors, torch.no_grad():
        stored = build.stored(config, tensors, held)
        assert set(stored) == set(held)
        for name, tensor in held.items():
            assert stored[name].shape == tuple(tensor.shape), name
            tensor.copy_(stored[name].read(whole(tuple(tensor.shape))))
    return config, model


def tensors_of(model: Decoder) -> dict[str, Tensor]:
    """What a folder holds: parameters and persistent buffers, live."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | buffers


def exported(config: ModelConfig, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """`values` by our names as the tensors of a model folder."""
    written: dict[str, Tensor] = {}
    for group in build.exported(config, {name: tuple(value.shape) for name, value in values.items()}):
        made = group.convert([values[name] for name in group.names])
        assert {name: tuple(value.shape) for name, value in made.items()} == group.files
        written |= made
    return written


def assert_close(ours: Tensor, reference: Tensor, what: str) -> None:
    error = (ours - reference).norm() / reference.norm()
    assert error < 1e-5, f"{what}: {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers_on_each_document(case: str, tmp_path: Path) -> None:
    reference = write_family(tmp_path, case)
    config, model = imported(tmp_path)
    tokens = torch.randint(VOCABULARY, (len(DOCUMENTS), 20), generator=torch.Generator().manual_seed(3))
    labels = torch.randint(VOCABULARY, tokens.shape, generator=torch.Generator().manual_seed(4))
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in DOCUMENTS]).int()
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in DOCUMENTS])
    apart = [
        reference(part[None]).logits[0] for row, ends in zip(tokens, DOCUMENTS, strict=True) for part in row.split(ends)
    ]
    wanted = torch.cat(apart)
    with torch.no_grad():
        assert_close(model(tokens, positions, documents), wanted, "logits")

    loss = model(tokens, positions, documents, labels)
    expected = torch.nn.functional.cross_entropy(wanted, labels.flatten(), reduction="sum")
    assert_close(loss, expected, "loss")
    loss.backward()
    expected.backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    ours = gradients(model)
    found = exported(config, ours) if config.family == "phi3" else {build.reference_name(n): g for n, g in ours.items()}
    assert found.keys() == theirs.keys()
    for name, gradient in found.items():
        assert_close(gradient, theirs[name], name)


@pytest.mark.parametrize("case", CASES)
def test_the_arithmetic_of_a_token_is_that_of_the_same_model_in_transformers_modules(case: str, tmp_path: Path) -> None:
    reference = write_family(tmp_path, case)
    config, count = imported_shape(tmp_path), sum(parameter.numel() for parameter in reference.parameters())
    other = TransformersFamily()
    theirs = ModelConfig(**other.shape(tmp_path, 64))
    for seq_len in (4, 64, 1024):
        assert build.flops_per_token(config, seq_len, count) == other.flops_per_token(theirs, seq_len, count)


@pytest.mark.parametrize("case", CASES)
def test_what_comes_from_a_folder_goes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    reference = write_family(tmp_path, case)
    config, model = imported(tmp_path)
    weights = exported(config, tensors_of(model))
    with open_weights(tmp_path) as found:
        assert weights.keys() == found.keys()
        for name, tensor in found.items():
            assert torch.equal(weights[name], tensor.read(whole(tensor.shape))), name

    assert build.changed_config_json(tmp_path, config, "fp32", True, 64) == json_of(tmp_path)
    if case == "phi3 with factors":
        with pytest.raises(ValueError, match=r"rope_type=longrope is exported with the config.json it came"):
            build.config_json(config, "fp32", 64, None)
        return
    values = build.config_json(config, "fp32", 64, None)
    folder = tmp_path / "again"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(again) is type(reference) and not any(loading.values()), loading
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, reference(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"nope_layers": [1]}, "smollm3"),
        ({"logits_scaling": 2.0}, "granite"),
        ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "qk_norm_over": "projection", "norm_placement": "after"}, "olmo2"),
        ({"family": "granite"}, "granite"),
        ({"sliding_window": 8}, "mistral"),
        ({"sliding_window": 8, "family": "phi3"}, "phi3"),
        ({"partial_rotary_factor": 0.5}, "phi3"),
        ({"sliding_window": 8, "sliding_rope_theta": 100.0, "full_attention_layers": [2], **GEMMA}, "gemma3_text"),
        ({"num_experts": 4}, "mixtral"),
        ({"num_experts": 4, "qk_norm": True, "first_dense_layers": 1}, "qwen3_moe"),
        ({"num_experts": 4, "qk_norm": True, "qk_norm_over": "projection", "norm_topk_prob": False}, "olmoe"),
        (
            {"num_experts": 4, "router": "sigmoid", "router_bias": True, "num_shared_experts": 1, "kv_lora_rank": 8},
            "deepseek_v3",
        ),
    ],
)
def test_a_model_from_scratch_is_exported_as_the_family_that_has_its_switches(
    changes: dict[str, Any], family: str
) -> None:
    assert family_of(shape(**changes)) == family


def test_a_mixture_that_no_architecture_has_is_not_exported() -> None:
    with pytest.raises(ValueError, match=r"has model.nope_layers=\[1\] with model.logits_scaling=2.0"):
        family_of(shape(nope_layers=[1], logits_scaling=2.0))
    with pytest.raises(ValueError, match=r"no architecture .* has .*hidden_act=gelu_pytorch_tanh with .*embedding_mul"):
        family_of(shape(**GEMMA | {"embedding_multiplier": 5.0}))
    linear = RopeParameters("linear", factor=2.0)
    with pytest.raises(ValueError, match=r"model.family=phi3 does not have model.rope_parameters.rope_type=linear"):
        family_of(shape(family="phi3", rope_parameters=linear))
    with pytest.raises(ValueError, match=r"model.sliding_rope_theta=null with rope_type=linear"):
        build.config_json(shape(sliding_window=8, rope_parameters=linear, **GEMMA), "fp32", 64, None)
    with pytest.raises(ValueError, match=r"attention_multiplier=0.3: Gemma 3's is 1 / sqrt\(n\)"):
        build.config_json(shape(attention_multiplier=0.3, sliding_window=8, **GEMMA), "fp32", 64, None)
    with pytest.raises(ValueError, match=r"model.family=qwen2 does not have model.nope_layers=\[1\]: smollm3 does"):
        family_of(shape(family="qwen2", nope_layers=[1]))
    with pytest.raises(ValueError, match=r"model.family=qwen2 does not have model.qkv_bias=False: llama"):
        family_of(shape(family="qwen2"))
    with pytest.raises(
        ValueError, match=r"no architecture of Hugging Face.s has model.num_experts=4 with .*router=sigmoid"
    ):
        family_of(shape(num_experts=4, router="sigmoid", router_bias=True, num_shared_experts=1))


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_stacked_experts_are_read_as_those_in_a_file_for_each(case: str, tmp_path: Path) -> None:
    reference = write_family(tmp_path / "apart", case)
    reference.save_pretrained(tmp_path / "stacked", save_original_format=False)
    (_, apart), (_, stacked) = imported(tmp_path / "apart"), imported(tmp_path / "stacked")
    with open_weights(tmp_path / "stacked") as found:
        assert "model.layers.1.mlp.experts.gate_up_proj" in found
    for name, value in stacked.named_parameters():
        assert torch.equal(value, apart.get_parameter(name)), name


def test_a_part_of_stacked_experts_is_read_as_of_the_whole(tmp_path: Path) -> None:
    write_family(tmp_path, "qwen3_moe")
    config, model = imported(tmp_path)
    name = "layers.1.mlp.experts.gate_up_proj"
    value = model.get_parameter(name)
    chunk = Chunk((2, 20, 3), (3, 9, 11))  # of both projections
    with open_weights(tmp_path) as found:
        stored = build.stored(config, found, [name])[name]
        assert torch.equal(stored.read(chunk), value[chunk.within(whole(tuple(value.shape)))])


def test_a_missing_expert_and_one_of_another_shape_are_named(tmp_path: Path) -> None:
    write_family(tmp_path, "mixtral")
    config, model = imported(tmp_path)
    lost = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    names = [name for name, _ in model.named_parameters()]
    with open_weights(tmp_path) as found:
        others = {name: tensor for name, tensor in found.items() if name != lost}
        with pytest.raises(ValueError, match=r"layers.1.mlp.experts.3.up_proj.weight is missing: a layer has 5"):
            build.stored(config, others, names)
        with pytest.raises(ValueError, match=r"layers.1.mlp.experts.3.up_proj.weight is F32 \(32, 48\), and"):
            build.stored(config, {**found, lost: found[lost.replace("w3", "w2")]}, names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads=2: latent attention has as many as num_attention_heads=4"),
        ({"n_shared_experts": 0}, "n_shared_experts=0"),
        ({"attention_bias": True}, "attention_bias=True"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
            "rope_type='dynamic': known are default, linear, llama3, yarn",
        ),
    ],
)
def test_latent_attention_that_the_decoder_does_not_compute_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_family(tmp_path, "deepseek_v3")
    (tmp_path / "config.json").write_text(json.dumps(json_of(tmp_path) | changes))
    with pytest.raises(ValueError, match=message):
        build.shape(tmp_path, 64)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1: the decoder has resid_pdrop=0.0"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act=gelu: the decoder has hidden_act=silu"),
        ("phi3", {"sliding_window": 0}, "sliding_window=0: a token sees itself"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0: the decoder has"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0: the decoder has"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True: the decoder has"),
        ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation=gelu: the decoder has silu and gelu_pytorch_tanh"),
        ("gemma3", {"layer_types": ["full_attention"]}, "transformers cannot read it.*layer_types"),
        ("gemma3", {"sliding_window": None}, "sliding_window=None: the decoder has it above 0"),
    ],
)
def test_what_phi3_and_gemma3_may_have_and_the_decoder_does_not_is_refused(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_family(tmp_path, case)
    (tmp_path / "config.json").write_text(json.dumps(json_of(tmp_path) | changes))
    with pytest.raises(ValueError, match=message):
        build.shape(tmp_path, 64)


def test_rotary_factors_that_phi3_chooses_by_its_batch_are_left_to_transformers(tmp_path: Path) -> None:
    write_family(tmp_path, "phi3 with factors")
    assert build.shape(tmp_path, 64)["rope_parameters.short_factor"] == [1.0, 1.5]
    with pytest.raises(ValueError, match=r"rope_type=longrope: beyond original_max_position_embeddings=64"):
        build.shape(tmp_path, 65)


def test_a_scaled_rotary_embedding_of_layers_with_a_window_is_refused(tmp_path: Path) -> None:
    write_family(tmp_path, "gemma3")
    values = json_of(tmp_path)
    values["rope_parameters"]["sliding_attention"] = {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="rope_type='linear' of sliding_attention"):
        build.shape(tmp_path, 64)


@pytest.mark.parametrize("case", ["phi3", "gemma3"])
def test_what_a_run_changed_of_windows_and_rotary_channels_is_written(case: str, tmp_path: Path) -> None:
    write_family(tmp_path, case)
    config, _ = imported(tmp_path)
    changed = {"sliding_window": 7}
    changed |= {"partial_rotary_factor": 1.0} if case == "phi3" else {"sliding_rope_theta": 70.0, "hidden_act": "silu"}
    config = dataclasses.replace(config, **changed)  # type: ignore[arg-type]
    values = build.changed_config_json(tmp_path, config, "fp32", True, 64)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert imported_shape(tmp_path) == config


def imported_shape(folder: Path) -> ModelConfig:
    found = build.shape(folder, 64)
    rope = {key.partition(".")[2]: found.pop(key) for key in list(found) if key.startswith("rope_parameters.")}
    return ModelConfig(**found, rope_parameters=RopeParameters(**rope), loss_chunk=7)


def test_a_part_of_fused_projections_is_read_as_of_the_whole(tmp_path: Path) -> None:
    write_family(tmp_path, "phi3")
    config, model = imported(tmp_path)
    for name in ("layers.1.attention.v.weight", "layers.0.mlp.up.weight"):
        value, chunk = model.get_parameter(name), Chunk((3, 4), (5, 6))
        with open_weights(tmp_path) as found:
            part = build.stored(config, found, [name])[name]
            assert torch.equal(part.read(chunk), value[chunk.within(whole(tuple(value.shape)))]), name


def test_fused_projections_of_other_heads_are_named(tmp_path: Path) -> None:
    write_family(tmp_path, "phi3")
    config, _ = imported(tmp_path)
    other = dataclasses.replace(config, num_key_value_heads=4)
    with open_weights(tmp_path) as found, pytest.raises(ValueError, match=r"qkv_proj.weight has shape \(64, 32\), the"):
        build.stored(other, found, [])


def json_of(folder: Path) -> Any:
    from stoker.models.hugging_face_config import read_json

    return read_json(folder / "config.json")


@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_cache_are_those_of_the_whole_sequence(case: str, tmp_path: Path) -> None:
    reference = write_family(tmp_path, case)
    _, model = imported(tmp_path)
    tokens = torch.arange(1, 21)[None]
    cache = Cache(32)
    with torch.no_grad():
        model.next_logits(tokens[:, :9], cache)
        for at in range(9, 20):
            found = model.next_logits(tokens[:, at : at + 1], cache)
        torch.testing.assert_close(found[0], reference(tokens).logits[0, -1], **CLOSE)
