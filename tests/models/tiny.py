"""Small decoders with random weights, and rows to feed them."""

from __future__ import annotations

import torch
from torch import Tensor

from stoker.conf.schema import ModelConfig
from stoker.models.decoder import Decoder, build
from stoker.parallel.batch import IGNORE_INDEX
from stoker.parallel.model import Normal, Part, whole_model


def shape(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "loss_chunk": 7,
        "initializer_range": 0.2,
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def decoder(config: ModelConfig, part: Part | None = None, seed: int = 0) -> Decoder:
    """Weights are random by global name, norms too, so that equal parts are equal and nothing hides behind a one."""
    model = build(config, part or whole_model(config.num_hidden_layers))
    assert isinstance(model, Decoder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(seed + sum(i * ord(c) for i, c in enumerate(name)))
            rule = model.initial(name)
            mean, std = (0.0, rule.std) if isinstance(rule, Normal) else (rule.value, 0.3)
            parameter.normal_(mean, std, generator=generator)
    return model


def rows(config: ModelConfig, count: int = 2, seq_len: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and labels; some labels are not trained on."""
    assert config.vocab_size is not None
    tokens = torch.randint(config.vocab_size, (count, seq_len), generator=torch.Generator().manual_seed(3))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORE_INDEX
    labels[0, 4:7] = IGNORE_INDEX
    return tokens, torch.arange(seq_len).expand(count, seq_len), labels


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found
