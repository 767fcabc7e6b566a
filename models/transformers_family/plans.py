"""Tensor-parallel plans of models for which transformers has none, or none that is complete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}

OWN_PLANS: dict[str, dict[str, str]] = {  # by model_type; added to transformers' own
    # The parameters of its activation are used on a rank's channels only, which transformers' plan leaves out
    "apertus": {"layers.*.mlp.act_fn": "replicated_with_grad_allreduce"},
    "stablelm": _LLAMA | {"layers.*.self_attn": "counted_heads"},
    "hunyuan_v1_dense": _LLAMA
    | {
        "layers.*.self_attn.query_layernorm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.key_layernorm": "replicated_with_grad_allreduce",
    },
    "gpt2": {
        "h.*.attn": "fused_heads",
        "h.*.attn.c_attn": "conv1d_qkv",
        "h.*.attn.c_proj": "conv1d_rowwise",
        "h.*.mlp.c_fc": "conv1d_colwise",
        "h.*.mlp.c_proj": "conv1d_rowwise",
    },
}


def own_plan(config: Any) -> Mapping[str, str]:
    """Stoker's plan for a model of this text config, empty if it has none."""
    if config.model_type == "stablelm" and config.qk_layernorm:  # a norm for each head of the whole model
        return {}
    return OWN_PLANS.get(config.model_type, {})
