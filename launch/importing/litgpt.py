"""litgpt's checkpoints: `lit_model.pth` and `model_config.yaml`.

Queries, keys and values are one matrix: `attn.qkv` holds all queries, then all keys, then all values; the older
`attn.attn` holds them group by group, the queries of a group before its key and its value. Rotary channels are paired
as in Hugging Face's models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
import yaml
from torch import Tensor

from stoker.conf.rundir import parse_yaml
from stoker.conf.schema import ModelConfig, RopeParameters
from stoker.launch.importing.pickled import tensors_of
from stoker.launch.importing.reference import logits, rotate_halves
from stoker.launch.importing.source import Source, SourceTensor, floating, of_tensor, refuse_unknown, without_tables
from stoker.models.hugging_face import DTYPES, config_json

WEIGHTS, CONFIG = "lit_model.pth", "model_config.yaml"
_MOST_BYTES = 1 << 20  # of a model_config.yaml
_OUTER = {
    "lm_head.weight": "lm_head.weight",
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
}
_INNER = {
    "norm_1.weight": "input_layernorm.weight",
    "norm_2.weight": "post_attention_layernorm.weight",
    "attn.proj.weight": "self_attn.o_proj.weight",
    "attn.norm_q.weight": "self_attn.q_norm.weight",
    "attn.norm_k.weight": "self_attn.k_norm.weight",
    "mlp.fc_1.weight": "mlp.gate_proj.weight",
    "mlp.fc_2.weight": "mlp.up_proj.weight",
    "mlp.proj.weight": "mlp.down_proj.weight",
}
_QKV = ("attn.qkv", "attn.attn")  # now, and before litgpt 0.5.4
# Values of model_config.yaml that the decoders of Llama, Qwen2 and Qwen3 have; another one is another model.
_FIXED: dict[str, Any] = {
    "bias": False,
    "lm_head_bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "parallel_residual": False,
    "rotary_percentage": 1.0,
    "rope_condense_ratio": 1,
    "norm_qk_type": "default",
    "scale_embeddings": False,
    "sliding_window_size": None,
    "attention_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attention_scores_scalar": None,
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "norm_1": True,
    "norm_2": True,
    "shared_attention_norm": False,
    "n_expert": 0,
}
_ABSENT = {"bias": True, "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "rotary_percentage": 0.25}
_ABSENT["parallel_residual"] = True  # defaults of litgpt, where they are not those above


@dataclass(frozen=True)
class _Shape:
    heads: int
    groups: int
    head_dim: int

    @property
    def parts(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values in a fused matrix."""
        return self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim


def open_litgpt(folder: Path, trust: bool) -> Source:
    """The model in `folder`. Raises ValueError for a damaged file, and for a model that is not of Llama's kind."""
    values = _read(folder / CONFIG)
    model, context = _model(folder / CONFIG, values)
    path = folder / WEIGHTS
    tensors, others = tensors_of(path, trust)
    found = without_tables({name: of_tensor(path, tensor) for name, tensor in tensors.items()})
    shape = _Shape(model.num_attention_heads, model.num_key_value_heads or 1, model.head_dim or 1)
    converted = _converted(found, shape)
    dtypes = {name: ours for ours, name in DTYPES.items()}
    config = config_json(model, dtypes.get(floating(found) or "", "fp32"), context, None)

    def reference(parsed: Any, tokens: Tensor) -> Tensor:
        return logits(
            parsed, tokens, lambda role: _outer(found, role), lambda n: _Layer(found, n, shape), rotate_halves
        )

    return Source(WEIGHTS, config, converted, _name_of, reference, left_out=tuple(others))


def _converted(found: Mapping[str, SourceTensor], shape: _Shape) -> dict[str, SourceTensor]:
    """By Hugging Face's names, queries, keys and values apart."""
    result: dict[str, SourceTensor] = {}
    unknown = []
    for name, tensor in found.items():
        if name in _OUTER:
            result[_OUTER[name]] = tensor
            continue
        layer, inner = _layer_of(name)
        module, _, kind = inner.rpartition(".")
        if layer is not None and inner in _INNER:
            result[f"model.layers.{layer}.{_INNER[inner]}"] = tensor
        elif layer is not None and module in _QKV and kind in ("weight", "bias"):
            rows = sum(shape.parts)
            if not tensor.shape or tensor.shape[0] != rows:
                raise ValueError(
                    f"{tensor.file}: {name} has shape {tensor.shape}; {CONFIG} makes {rows} rows of it: "
                    f"n_head={shape.heads} + 2 x n_query_groups={shape.groups}, each of head_size={shape.head_dim}"
                )
            for part, letter in enumerate("qkv"):
                split = tensor.made(
                    (shape.parts[part], *tensor.shape[1:]),
                    lambda value, part=part, module=module: _split(value, shape, module)[part],  # type: ignore[misc]
                )
                result[f"model.layers.{layer}.self_attn.{letter}_proj.{kind}"] = split
        else:
            unknown.append(name)
    refuse_unknown("a model of litgpt of Llama's kind", unknown)
    return result


def _split(value: Tensor, shape: _Shape, module: str) -> tuple[Tensor, ...]:
    """Rows of a fused matrix or bias as those of queries, keys and values."""
    if module == _QKV[0]:
        return value.split(shape.parts)
    own = shape.heads // shape.groups
    grouped = value.unflatten(0, (shape.groups, own + 2, shape.head_dim))
    return tuple(part.flatten(0, 2) for part in grouped.split((own, 1, 1), 1))


_ROLES = {  # of `reference.Layer.weight`
    "attention_norm": "norm_1",
    "mlp_norm": "norm_2",
    "o": "attn.proj",
    "gate": "mlp.fc_1",
    "up": "mlp.fc_2",
    "down": "mlp.proj",
}


class _Layer:
    """A layer in litgpt's own layout (see `stoker.launch.importing.reference.Layer`)."""

    def __init__(self, found: Mapping[str, SourceTensor], number: int, shape: _Shape) -> None:
        self._found, self._prefix, self._shape = found, f"transformer.h.{number}", shape

    def weight(self, role: str) -> Tensor:
        return self._found[f"{self._prefix}.{_ROLES[role]}.weight"].load()

    def head_norm(self, kind: str) -> Tensor | None:
        tensor = self._found.get(f"{self._prefix}.attn.norm_{kind}.weight")
        return None if tensor is None else tensor.load()

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What litgpt's attention makes of the product with the fused matrix."""
        fused = _QKV[0] if f"{self._prefix}.{_QKV[0]}.weight" in self._found else _QKV[1]
        bias = self._found.get(f"{self._prefix}.{fused}.bias")
        product = F.linear(
            x,
            self._found[f"{self._prefix}.{fused}.weight"].load().float(),
            None if bias is None else bias.load().float(),
        )
        tokens, (heads, groups, dim) = len(x), (self._shape.heads, self._shape.groups, self._shape.head_dim)
        if fused == _QKV[0]:
            ends = heads * dim, (heads + groups) * dim
            q, k, v = product[:, : ends[0]], product[:, ends[0] : ends[1]], product[:, ends[1] :]
            return q.view(tokens, heads, dim), k.view(tokens, groups, dim), v.view(tokens, groups, dim)
        each = product.view(tokens, groups, heads // groups + 2, dim)
        return each[:, :, :-2].reshape(tokens, heads, dim), each[:, :, -2], each[:, :, -1]


def _outer(found: Mapping[str, SourceTensor], role: str) -> Tensor:
    names = {"embedding": "transformer.wte.weight", "norm": "transformer.ln_f.weight", "head": "lm_head.weight"}
    return found[names[role]].load()


def _layer_of(name: str) -> tuple[int | None, str]:
    """The number of the layer in `transformer.h.N.REST`, and REST."""
    number, _, inner = name.removeprefix("transformer.h.").partition(".")
    return (int(number), inner) if name.startswith("transformer.h.") and number.isdecimal() else (None, name)


def _name_of(name: str) -> str:
    """litgpt's name of a tensor of Hugging Face's."""
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    if name in outer:
        return outer[name]
    number, _, inner = name.removeprefix("model.layers.").partition(".")
    fused = f"{_QKV[0]}.{inner.rpartition('.')[2]}"
    own = {theirs: ours for ours, theirs in _INNER.items()}.get(inner, fused)
    return f"transformer.h.{number}.{own}"


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES:,} bytes: it is no config of a model")
    try:
        values = parse_yaml(data.decode())
    except (ValueError, OverflowError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no values by name")
    return values


def _model(path: Path, values: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """The decoder that a model_config.yaml describes, and the positions it supports. Raises ValueError naming a key."""
    for key, value in _FIXED.items():
        found = values.get(key, _ABSENT.get(key, value))
        if found != value and not (key == "norm_qk_type" and not values.get("norm_qk")):
            raise ValueError(f"{path}: {key}={found!s:.80}: models with {key}={value} are imported")

    def number(key: str, default: int | None = None) -> int:
        value = values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise ValueError(f"{path}: {key}={value!s:.80} is not a whole number above 0")
        return value

    def real(key: str, default: float, among: Mapping[str, Any] = values) -> float:
        value = among.get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ValueError(f"{path}: {key}={value!s:.80} is not a number above 0")
        return float(value)

    heads, width = number("n_head"), number("n_embd")
    groups, context = number("n_query_groups", heads), number("block_size", 4096)
    head_dim = number("head_size", max(1, width // heads))
    if heads % groups:
        raise ValueError(f"{path}: n_head={heads} is no multiple of n_query_groups={groups}")
    rope = RopeParameters(rope_theta=real("rope_base", 10000))
    scaling = values.get("rope_adjustments")
    if scaling is not None:
        if not isinstance(scaling, dict) or set(scaling) != {
            "factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len",
        }:  # fmt: skip
            raise ValueError(f"{path}: rope_adjustments={scaling!s:.80}: those of Llama 3.1 are imported")
        rope = RopeParameters(
            rope_type="llama3",
            rope_theta=rope.rope_theta,
            factor=real("factor", 0, scaling),
            low_freq_factor=real("low_freq_factor", 0, scaling),
            high_freq_factor=real("high_freq_factor", 0, scaling),
            original_max_position_embeddings=int(real("original_max_seq_len", 0, scaling)),
        )
    model = ModelConfig(
        vocab_size=number("padded_vocab_size"),
        hidden_size=width,
        num_hidden_layers=number("n_layer"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=number("intermediate_size"),
        rms_norm_eps=real("norm_eps", 1e-5),
        rope_parameters=rope,
        qkv_bias=values.get("attn_bias") is True,
        qk_norm=values.get("norm_qk") is True,
    )
    return model, context
