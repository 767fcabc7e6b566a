"""The decoder as an engine sees it: parts, names, starting values, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from stoker.conf.schema import ModelConfig, from_dict
from stoker.models.decoder import build
from stoker.models.flops import flops_per_token
from stoker.parallel.model import Constant, Normal, Part, whole_model
from tests.models.tiny import decoder, gradients, rows, shape

GROUP = Path(__file__).parents[2] / "conf" / "model"


def published(name: str) -> ModelConfig:
    config = from_dict(yaml.safe_load((GROUP / f"{name}.yaml").read_text()), ModelConfig)
    assert isinstance(config, ModelConfig)
    assert config.name == name
    return config


def parameter_count(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = build(config, whole_model(config.num_hidden_layers))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama3_1b", 1_235_814_400),
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("qwen3_0_6b", 596_049_920),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(name: str, count: int) -> None:
    assert parameter_count(published(name)) == count


def test_the_demo_has_three_million_parameters_and_small_is_the_size_of_gpt2() -> None:
    tiny, small = published("tiny"), published("small")
    assert tiny.vocab_size is None and small.vocab_size is None, "they take the tokenizer's"
    tiny.vocab_size, small.vocab_size = 320, 50304
    assert 2.8e6 < parameter_count(tiny) < 3.5e6
    assert 1.20e8 < parameter_count(small) < 1.30e8


@pytest.mark.parametrize(("qk_norm", "qkv_bias", "tied"), [(False, False, False), (True, True, True)])
def test_parameters_go_by_their_global_names(qk_norm: bool, qkv_bias: bool, tied: bool) -> None:
    config = shape(num_hidden_layers=2, qk_norm=qk_norm, qkv_bias=qkv_bias, tie_word_embeddings=tied)
    expected = {"embedding.weight", "norm.weight"} | (set() if tied else {"head.weight"})
    for n in range(2):
        layer = f"layers.{n}"
        expected |= {f"{layer}.attention_norm.weight", f"{layer}.mlp_norm.weight"}
        expected |= {f"{layer}.attention.{part}.weight" for part in "qkvo"}
        expected |= {f"{layer}.mlp.{part}.weight" for part in ("gate", "up", "down")}
        expected |= {f"{layer}.attention.{part}.bias" for part in "qkv"} if qkv_bias else set()
        expected |= {f"{layer}.attention.{part}_norm.weight" for part in "qk"} if qk_norm else set()
    assert {name for name, _ in decoder(config).named_parameters()} == expected


def test_a_part_has_the_names_of_its_layers_only() -> None:
    config = shape(num_hidden_layers=3, tie_word_embeddings=True)
    middle = decoder(config, Part(range(1, 2), embedding=False, head=False))
    last = decoder(config, Part(range(2, 3), embedding=False, head=True))
    assert list(middle.blocks()) == ["1"]
    assert all(name.startswith("layers.1.") for name, _ in middle.named_parameters())
    others = {name for name, _ in last.named_parameters() if not name.startswith("layers.2.")}
    assert others == {"embedding.weight", "norm.weight"}


@pytest.mark.parametrize("documents_given", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ends", [[3], [1, 3], [1, 2, 3], [2, 2, 3]])
def test_parts_in_a_chain_compute_what_the_whole_computes(ends: list[int], tied: bool, documents_given: bool) -> None:
    config = shape(num_hidden_layers=3, tie_word_embeddings=tied)
    tokens, positions, labels = rows(config)
    documents = torch.arange(20).div(8, rounding_mode="floor").int().expand(2, 20) if documents_given else None
    whole = decoder(config)
    expected = whole(tokens, positions, documents, labels)
    expected.backward()

    starts = [0, *ends[:-1]]
    parts = [
        decoder(config, Part(range(start, end), embedding=i == 0, head=i == len(ends) - 1))
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    x = tokens
    for part in parts:
        if part is not parts[0]:
            assert x.shape == (tokens.numel(), config.hidden_size)
        x = part(x, positions, documents, labels)
    assert torch.equal(x, expected)
    x.backward()
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, gradient in gradients(part).items():
            found[name] = found[name] + gradient if name in found else gradient
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    assert found.keys() == gradients(whole).keys()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_from_the_meta_device_computes_the_same_once_it_is_filled(tied: bool) -> None:
    config = shape(tie_word_embeddings=tied)
    model = decoder(config)
    with torch.device("meta"):
        empty = build(config, whole_model(config.num_hidden_layers))
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.to_empty(device="cpu")
    empty.rebuild_buffers()  # type: ignore[operator]
    filled = dict(empty.named_parameters())
    assert filled.keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            filled[name].copy_(parameter)
    tokens, positions, labels = rows(config)
    assert torch.equal(empty(tokens, positions, None, labels), model(tokens, positions, None, labels))


def test_activations_have_the_dtype_of_the_weights_and_the_loss_is_fp32() -> None:
    config = shape()
    tokens, positions, labels = rows(config)
    first = Part(range(1), embedding=True, head=False)
    assert decoder(config, first).bfloat16()(tokens, positions, None).dtype == torch.bfloat16
    assert decoder(config, first)(tokens, positions, None).dtype == torch.float32
    model = decoder(config)
    precise = model(tokens, positions, None, labels).item()
    loss = model.bfloat16()(tokens, positions, None, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(precise, rel=0.02)
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients(model).values())


def test_an_embedding_met_often_has_a_gradient_as_precise_as_its_dtype() -> None:
    model = decoder(shape(), Part(range(0), embedding=True, head=False)).bfloat16()
    tokens = torch.zeros(4, 512, dtype=torch.int64)
    gradient = torch.rand(4 * 512, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    model(tokens, tokens, None).backward(gradient)
    found = model.embedding.weight.grad
    assert found is not None
    torch.testing.assert_close(found[0].double(), gradient.double().sum(0), rtol=2**-8, atol=0.0)
    assert not found[1:].any()


def test_weights_start_smaller_where_they_add_to_the_residual_stream() -> None:
    model = decoder(shape(num_hidden_layers=8, initializer_range=0.02, qkv_bias=True, qk_norm=True))
    for name in ("embedding.weight", "head.weight", "layers.3.attention.q.weight", "layers.0.mlp.up.weight"):
        assert model.initial(name) == Normal(0.02)
    for name in ("layers.3.attention.o.weight", "layers.7.mlp.down.weight"):
        assert model.initial(name) == Normal(0.005)
    for name in ("norm.weight", "layers.1.mlp_norm.weight", "layers.1.attention.k_norm.weight"):
        assert model.initial(name) == Constant(1.0)
    assert model.initial("layers.1.attention.k.bias") == Constant(0.0)


def test_a_compiled_block_is_one_graph() -> None:
    config = shape()
    tokens, positions, labels = rows(config)
    model = decoder(config)
    expected = model(tokens, positions, None, labels)
    for block in model.blocks().values():
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    loss = model(tokens, positions, None, labels)
    loss.backward()
    torch.testing.assert_close(loss, expected)


def test_flops_are_six_per_multiplying_parameter_and_attention_over_the_row() -> None:
    tied, untied = shape(tie_word_embeddings=True), shape()
    attention = 12 * 3 * 32 * 128
    count = parameter_count(tied)
    assert flops_per_token(tied, 128, count) == 6 * count + attention
    assert flops_per_token(untied, 128, parameter_count(untied)) == 6 * count + attention


def test_keys_before_a_window_do_not_count() -> None:
    config = shape(tie_word_embeddings=True, sliding_window=16, full_attention_layers=[1])
    count = parameter_count(config)
    assert flops_per_token(config, 128, count) == 6 * count + 12 * 32 * (128 + 2 * 16)
    assert flops_per_token(config, 10, count) == 6 * count + 12 * 32 * 3 * 10


def test_scores_and_values_of_latent_attention_count_by_their_own_widths() -> None:
    widths = {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 14}
    config = shape(tie_word_embeddings=True, num_key_value_heads=None, kv_lora_rank=8, **widths)
    count, heads = parameter_count(config), config.num_attention_heads
    assert flops_per_token(config, 128, count) == 6 * count + 6 * 3 * heads * (6 + 4 + 14) * 128
