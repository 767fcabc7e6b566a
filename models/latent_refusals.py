"""Settings that latent attention does not read, and its own without it, with what works."""

from __future__ import annotations

from stoker.conf.schema import ModelConfig
from stoker.models.expert_refusals import REFUSALS, changed_settings
from stoker.parallel.start import Start

OF_LATENTS = ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave")
_OF_OTHERS = (
    *("qk_norm", "qk_norm_over", "qkv_bias", "nope_layers", "zero_centered_norm", "partial_rotary_factor"),
    *("sliding_window", "full_attention_layers", "sliding_rope_theta"),
)


@REFUSALS.entry(
    "settings of no latent attention",
    "keys of latent attention with model.kv_lora_rank=null",
    "they would have no effect",
)
def _settings_of_no_latents(start: Start) -> str | None:
    model = start.config.model
    shown = changed_settings(model, OF_LATENTS) if model.kv_lora_rank is None else ""
    return f"{shown} with model.kv_lora_rank=null: model.kv_lora_rank=512 has latent attention" if shown else None


@REFUSALS.entry(
    "latent attention",
    "model.kv_lora_rank with model.qk_norm, qkv_bias, nope_layers, windows, zero_centered_norm or "
    "partial_rotary_factor, with fewer kv heads than heads, or with model.head_dim",
    "each head has keys and values of its own, as wide as model.qk_nope_head_dim, qk_rope_head_dim and v_head_dim",
)
def _others_with_latents(start: Start) -> str | None:
    model, default = start.config.model, ModelConfig()
    if model.kv_lora_rank is None:
        return None
    fitting = {key: getattr(default, key) for key in _OF_OTHERS}
    if model.num_key_value_heads != model.num_attention_heads:
        fitting["num_key_value_heads"] = None
    if model.head_dim != model.qk_rope_head_dim:
        fitting["head_dim"] = None
    others = {key: value for key, value in fitting.items() if getattr(model, key) != value}
    if not others:
        return None
    shown = ", ".join(f"model.{key}={getattr(model, key)}" for key in others)
    works = " ".join(f"model.{key}={_shown(value)}" for key, value in others.items())
    return f"model.kv_lora_rank={model.kv_lora_rank} with {shown}: {works} works"


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
