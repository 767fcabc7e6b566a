"""The decoder family in Hugging Face's words: config.json and the names of tensors, in both directions.

No weight changes its layout on the way: `stoker.models.rope` pairs channels as Hugging Face's models do, and queries,
keys and values are tensors of their own on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from stoker.conf.schema import ModelConfig, RopeScalingConfig
from stoker.models.attention import head_dim_of
from stoker.parallel.dtypes import PRECISIONS

_OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_INNER = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attention": "self_attn"}
_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
_SHAPE = {  # ours -> theirs, where both mean the same number
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
}
_ROPE_SCALING = {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}


@dataclass(frozen=True)
class Family:
    """An architecture of Hugging Face's that is a case of our decoder."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
}


def tensor_name(name: str) -> str:
    """Hugging Face's name of our parameter `name`: `layers.0.mlp.up.weight` is `model.layers.0.mlp.up_proj.weight`."""
    if name in _OUTER:
        return _OUTER[name]
    parts = [f"{part}_proj" if part in _PROJECTIONS else _INNER.get(part, part) for part in name.split(".")]
    return ".".join(["model", *parts])


def family_of(config: ModelConfig) -> str:
    """The family that `config` belongs to: `model.family`, else the first that has its biases and norms.

    Raises ValueError when there is none, or when the one asked for is built otherwise.
    """
    built = (config.qkv_bias, config.qk_norm)
    fitting = [name for name, family in FAMILIES.items() if (family.qkv_bias, family.qk_norm) == built]
    if config.family is None and fitting:
        return fitting[0]
    if config.family in fitting:
        return config.family
    what = f"model.qkv_bias={built[0]} with model.qk_norm={built[1]}"
    if not fitting:
        raise ValueError(f"no architecture of Hugging Face's has {what}")
    raise ValueError(f"model.family={config.family} does not have {what}: {' and '.join(fitting)} do")


def config_json(config: ModelConfig, dtype: str, context: int, end_of_document: int) -> dict[str, Any]:
    """The config.json of `config`, whose `vocab_size` is known. `dtype` is one of PRECISIONS, `context` counts tokens.

    Raises ValueError for a shape that no family has.
    """
    family = family_of(config)
    scaling, named = config.rope_scaling, str(PRECISIONS[dtype]).removeprefix("torch.")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling.factor != 1.0:
        rope |= {"rope_type": "llama3"} | {theirs: getattr(scaling, ours) for ours, theirs in _ROPE_SCALING.items()}
    values: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()}
    values |= {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "num_key_value_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": head_dim_of(config),
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "tie_word_embeddings": config.tie_word_embeddings,
        "sliding_window": None,
        "use_cache": True,
        "rope_parameters": rope,  # transformers 5; what follows are the names of transformers 4
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling.factor == 1.0 else {k: v for k, v in rope.items() if k != "rope_theta"},
        "bos_token_id": None,
        "eos_token_id": end_of_document,
        "dtype": named,
        "torch_dtype": named,
    }
    return dict(sorted(values.items()))


def shape_of(values: Mapping[str, Any], seq_len: int) -> dict[str, Any]:
    """What a config.json says of a `ModelConfig`: values by key (`rope_scaling.factor`), for rows of `seq_len` tokens.

    Raises ValueError naming what our decoder does not compute, and what the file lacks.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r}: known are {', '.join(FAMILIES)}")
    _refuse_foreign(values, seq_len)
    missing = [theirs for theirs in _SHAPE.values() if theirs not in values and theirs != "initializer_range"]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    found = {ours: values[theirs] for ours, theirs in _SHAPE.items() if theirs in values}
    rope = _rope(values)
    return found | {
        "family": family,
        "num_key_value_heads": values.get("num_key_value_heads") or found["num_attention_heads"],
        "head_dim": values.get("head_dim") or found["hidden_size"] // found["num_attention_heads"],
        "qkv_bias": FAMILIES[family].qkv_bias,
        "qk_norm": FAMILIES[family].qk_norm,
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", False)),
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
        **_scaling(rope),
    }


def _refuse_foreign(values: Mapping[str, Any], seq_len: int) -> None:
    wanted = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
    for key, value in wanted.items():
        if values.get(key, value) != value:
            raise ValueError(f"{key}={values[key]}: our decoder has {key}={value}")
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    if window is not None and window < seq_len:
        raise ValueError(f"sliding_window={window}: our decoder attends to the whole row; seq_len={window} works")


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's values, in the words of transformers 5, also from a file of transformers 4."""
    rope = dict(values.get("rope_parameters") or {"rope_theta": values.get("rope_theta", 10000.0)})
    return rope | dict(values.get("rope_scaling") or {})


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type={kind!r}: known are 'default' and 'llama3'")
    values = asdict(RopeScalingConfig())
    if kind == "llama3":
        values |= {ours: type(values[ours])(rope[theirs]) for ours, theirs in _ROPE_SCALING.items() if theirs in rope}
    return {f"rope_scaling.{name}": value for name, value in values.items()}
