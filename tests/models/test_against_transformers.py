"""Weights copied into Hugging Face's models give the same logits, losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from stoker.conf.schema import RopeParameters
from stoker.models.hugging_face import tensor_name
from stoker.models.hugging_face_families import rope_parameters
from tests.models.tiny import decoder, gradients, rows, shape

SCALED = RopeParameters("llama3", 5000.0, 8.0, 1.0, 4.0, 64)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with scaled rotary": ("Llama", {"rope_parameters": SCALED}),
    "tied llama without groups": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": None}),
    "qwen2": ("Qwen2", {"qkv_bias": True}),
    "qwen3": ("Qwen3", {"qk_norm": True, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
}


def theirs(family: str, config: Any) -> Any:
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
            rope_parameters=rope_parameters(config),
            max_position_embeddings=512,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )


def assert_close(ours: Tensor, reference: Tensor, what: str) -> None:
    error = (ours - reference).norm() / reference.norm()
    assert error < 1e-5, f"{what}: {error:.1e}"


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_loss_and_gradients_are_those_of_transformers(case: str) -> None:
    family, changes = FAMILIES[case]
    config = shape(**changes)
    model, reference = decoder(config), theirs(family, config)
    weights = {tensor_name(name): parameter.detach() for name, parameter in model.named_parameters()}
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
        assert_close(gradient, expected[tensor_name(name)].grad, name)
