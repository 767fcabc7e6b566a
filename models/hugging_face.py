"""The decoder family in Hugging Face's format: the names of tensors, and config.json for export.

Of weights only those of experts (`stoker.models.hugging_face_experts`) and fused projections
(`stoker.models.hugging_face_fused`) change their layout: `stoker.models.rope` pairs channels as these do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stoker.conf.schema import ModelConfig
from stoker.models.attention import head_dim_of
from stoker.models.feed_forward import expert_width
from stoker.models.hugging_face_families import FAMILIES, family_of, written_rope
from stoker.parallel.dtypes import PRECISIONS

OWN_MODEL = "stoker"  # model_type of an exported model that is not one of Hugging Face's (`model.target`)
DTYPES = {name: str(dtype).removeprefix("torch.") for name, dtype in PRECISIONS.items()}  # by config.json's names

_OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_INNER = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention_post_norm": "post_attention_layernorm",  # a layer has either this one or `mlp_norm`
    "mlp_pre_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
    "attention": "self_attn",
    "router": "gate",
    "shared": "shared_experts",
    "q_a_norm": "q_a_layernorm",
    "kv_a_norm": "kv_a_layernorm",
    "kv_a": "kv_a_proj_with_mqa",
}
_ROUTER_BIAS, _THEIR_BIAS = "mlp.router.bias", "mlp.gate.e_score_correction_bias"
_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down", "q_a", "q_b", "kv_b")
SHAPE = {  # ours -> theirs, where both mean the same number
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
}


def tensor_name(name: str) -> str:
    """Hugging Face's name of our parameter `name`: `layers.0.mlp.up.weight` is `model.layers.0.mlp.up_proj.weight`."""
    if name in _OUTER:
        return _OUTER[name]
    if name.endswith(_ROUTER_BIAS):
        return f"model.{name.removesuffix(_ROUTER_BIAS)}{_THEIR_BIAS}"
    parts = [f"{part}_proj" if part in _PROJECTIONS else _INNER.get(part, part) for part in name.split(".")]
    return ".".join(["model", *parts])


def reference_name(name: str) -> str:
    """Hugging Face's name of our parameter or module `name`."""
    return tensor_name(name) if name in _OUTER else tensor_name(f"{name}.weight").removesuffix(".weight")


def config_json(config: ModelConfig, dtype: str, context: int, end_of_document: int | None) -> dict[str, Any]:
    """The config.json of `config`, whose `vocab_size` is known. `dtype` is one of DTYPES, `context` counts tokens.

    Raises ValueError for a shape that no family has.
    """
    values = {"hidden_act": "silu", "sliding_window": None} | _architecture(config) | written_rope(config)
    values |= {
        "max_position_embeddings": context,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": end_of_document,
        "dtype": DTYPES[dtype],
        "torch_dtype": DTYPES[dtype],
    }
    if FAMILIES[values["model_type"]].pads:
        values["pad_token_id"] = None
    if "kv_lora_rank" in values:  # of DeepSeek's: without layers that predict further tokens
        values["num_nextn_predict_layers"] = 0
    if "hidden_activation" in values:
        del values["hidden_act"]
    return dict(sorted(values.items()))


def changed_config_json(
    base: Mapping[str, Any], base_shape: Mapping[str, Any], config: ModelConfig, dtype: str, same_dtype: bool
) -> dict[str, Any]:
    """`base`, the config.json of an imported model, with the changes of `config` and `dtype` since the import.

    `base_shape` is the result of `stoker.models.hugging_face_config.shape_of` for it, and `same_dtype` is true if its
    weights were in `dtype`. Unchanged keys keep their spelling and their place.
    """
    values = dict(base)
    before = {key: value for key, value in base_shape.items() if not key.startswith("rope_parameters.")}
    theirs = _architecture(config)
    for key, name in {**SHAPE, **_MORE}.items():
        if before[key] != _ours(config)[key]:
            values[name] = theirs[name]
    family = theirs["model_type"]
    if before["family"] != family:
        values |= {"model_type": family, "architectures": theirs["architectures"], **FAMILIES[family].written(config)}
    changed = {key for key in FAMILIES[family].reads if before[key] != getattr(config, key)}
    if changed:
        values |= FAMILIES[family].written(config)
    rope_before = {key.partition(".")[2]: value for key, value in base_shape.items() if key not in before}
    if rope_before != vars(config.rope_parameters) or changed & {"sliding_rope_theta", "partial_rotary_factor"}:
        rope = written_rope(config)
        for old in rope:
            values.pop(old, None)
        values["rope_parameters"] = rope["rope_parameters"]
    if not same_dtype:
        for key in [key for key in ("dtype", "torch_dtype") if key in values] or ["dtype"]:
            values[key] = DTYPES[dtype]
    return values


_MORE = {
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tie_word_embeddings",
}


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """The shape of the model, except its rotary embedding, by transformers' names."""
    family = family_of(config)
    values = _ours(config)
    return {name: values[key] for key, name in {**SHAPE, **_MORE}.items()} | {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        **FAMILIES[family].written(config),
    }


def _ours(config: ModelConfig) -> dict[str, Any]:
    own = vars(config) | {
        "num_key_value_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": head_dim_of(config),
    }
    return own | {"intermediate_size": expert_width(config)} if FAMILIES[family_of(config)].all_sparse else own
