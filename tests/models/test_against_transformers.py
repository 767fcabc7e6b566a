"""Weights copied into Hugging Face's models give the same logits, losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stoker.conf.schema import RopeScalingConfig
from tests.models.tiny import decoder, gradients, rows, shape

transformers = pytest.importorskip("transformers")

SCALING = RopeScalingConfig(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context=64)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with scaled rotary": ("Llama", {"rope_scaling": SCALING, "rope_theta": 5000.0}),
    "tied llama without groups": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": None}),
    "qwen2": ("Qwen2", {"qkv_bias": True}),
    "qwen3": ("Qwen3", {"qk_norm": True, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
}


def theirs(family: str, config: Any) -> Any:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling.factor > 1:
        scaling = config.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    kind = getattr(transformers, f"{family}Config")
    return getattr(transformers, f"{family}ForCausalLM")(
        kind(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=rope,
            max_position_embeddings=512,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )


def their_name(name: str) -> str:
    if name.startswith("head"):
        return "lm_head.weight"
    for ours, hugging_face in (
        ("embedding.", "embed_tokens."),
        ("attention_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
        ("attention.", "self_attn."),
    ):
        name = name.replace(ours, hugging_face)
    for part in ("q", "k", "v", "o", "gate", "up", "down"):
        name = name.replace(f".{part}.", f".{part}_proj.")
    return f"model.{name}"


def assert_close(ours: Tensor, reference: Tensor, what: str) -> None:
    error = (ours - reference).norm() / reference.norm()
    assert error < 1e-5, f"{what}: {error:.1e}"


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_loss_and_gradients_are_those_of_transformers(case: str) -> None:
    family, changes = FAMILIES[case]
    config = shape(**changes)
    model, reference = decoder(config), theirs(family, config)
    weights = {their_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    assert len(list(reference.parameters())) == len(weights)

    tokens, positions, labels = rows(config, seq_len=150)
    with torch.no_grad():
        assert_close(model(tokens, positions, None), reference(tokens).logits.flatten(0, 1), "logits")

    loss = model(tokens, positions, None, labels)
    logits = reference(tokens).logits.flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    assert_close(loss, wanted, "loss")
    loss.backward()
    wanted.backward()
    expected = dict(reference.named_parameters())
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[their_name(name)].grad, name)
