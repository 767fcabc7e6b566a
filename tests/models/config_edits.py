"""Random edits of a config.json: keys removed, renamed to old spellings, added, and values changed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.models.families import FAMILIES, write_family

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VALUES: dict[str, list[Any]] = {
    "hidden_act": ["silu", "swish", "gelu", "relu"],
    "rms_norm_eps": [1e-6, 1e-5, 1e-3, 0.1, "1e-5", None],
    "num_attention_heads": [4, 2, 8, 3],
    "num_key_value_heads": [1, 2, 4, 3, None],
    "head_dim": [8, 16, 4, None],
    "num_hidden_layers": [2, 3, 4],
    "hidden_size": [32, 64],
    "intermediate_size": [48, 96],
    "vocab_size": [320, 256, 384],
    "max_position_embeddings": [64, 512, 8192],
    "tie_word_embeddings": [True, False, None],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "attention_dropout": [0.0, 0.1],
    "sliding_window": [None, 0, 8, 32, 64, 4096],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 3, 28],
    "layer_types": [["full_attention"] * 3, ["sliding_attention"] * 3, ["full_attention"], None],
    "rope_theta": [5000.0, 500000, "10000", None],
    "partial_rotary_factor": [0.5, 1.0],
    "rope_scaling": [
        None,
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {**LLAMA3, "original_max_position_embeddings": 32},
        {"type": "llama3", **{key: value for key, value in LLAMA3.items() if key != "rope_type"}},
        LLAMA3,
        {"rope_type": "default"},
        {"rope_type": "default", "factor": 2.0},
    ],
    "rope_parameters": [
        None,
        {},
        {"rope_theta": 5000.0},
        {"rope_type": "default", "rope_theta": 5000},
        {**LLAMA3, "rope_theta": 5000.0, "original_max_position_embeddings": 64},
        {**LLAMA3, "rope_theta": 5000.0},
        {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        {"full_attention": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_type": "proportional", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    ],
    "pad_token_id": [None, 0, -1, 319, 5000],
    "eos_token_id": [None, 2, [2, 3]],
    "pretraining_tp": [1, 2],
    "model_type": ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma2"],
    "architectures": [["LlamaForSequenceClassification"], None, ["LlamaModel"]],
    "dtype": ["bfloat16", "float16", None],
    "initializer_range": [0.02, 1.0, 2.0],
    "is_causal": [False, True],
    "is_encoder_decoder": [True, False],
    "logits_soft_cap": [30.0],
    "final_logit_softcapping": [30.0],
    "attn_logit_softcapping": [50.0],
    "logit_scale": [0.5],
    "embedding_multiplier": [12.0],
    "residual_multiplier": [0.2],
    "attention_multiplier": [0.1],
    "clip_qkv": [8.0],
    "no_rope_layers": [[0, 1, 0]],
    "attention_chunk_size": [8],
    "attn_implementation": ["eager", "sdpa"],
    "per_layer_config": [{"1": {"intermediate_size": 48}}],
    "quantization_config": [{"quant_method": "fp8"}],
    "auto_map": [{"AutoModelForCausalLM": "modeling.Model"}],
    "temperature": [0.5],
    "unsloth_fixed": [True],
}
# How earlier versions of transformers spelled keys, and how other libraries do.
SPELLINGS = {
    "dtype": "torch_dtype",
    "rms_norm_eps": "rms_norm_eps",
    "num_key_value_heads": "num_kv_heads",
    "num_hidden_layers": "n_layers",
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "rope_parameters": "rope_scaling",
    "max_position_embeddings": "max_sequence_length",
}


def edited(seed: int, folder: Path) -> tuple[str, str]:
    """Write a random model to `folder` and edit its config.json once to three times; the family, and the edits."""
    draw = random.Random(seed)
    case = draw.choice(list(FAMILIES))
    write_family(folder, case)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    kinds = (_remove, _respell, _change, _change, _change, _old_rope)
    edits = [draw.choice(kinds)(draw, values) for _ in range(draw.choice((1, 1, 2, 3)))]
    path.write_text(json.dumps(values))
    return case, "; ".join(edits)


def _remove(draw: random.Random, values: dict[str, Any]) -> str:
    key = draw.choice(sorted(values))
    del values[key]
    return f"without {key}"


def _respell(draw: random.Random, values: dict[str, Any]) -> str:
    old, new = draw.choice(sorted(SPELLINGS.items()))
    if old in values:
        values[new] = values.pop(old)
    return f"{old} spelled {new}"


def _change(draw: random.Random, values: dict[str, Any]) -> str:
    key = draw.choice(sorted(VALUES))
    values[key] = draw.choice(VALUES[key])
    return f"{key}={values[key]}"


def _old_rope(draw: random.Random, values: dict[str, Any]) -> str:
    """As transformers 4 wrote it, or half so."""
    rope = dict(values.pop("rope_parameters", None) or {})
    values["rope_theta"] = rope.pop("rope_theta", 10000.0) if draw.random() < 0.7 else draw.choice((5000.0, 1e6))
    where = draw.choice(("rope_scaling", "rope_parameters"))
    if draw.random() < 0.5:
        rope["type"] = rope.pop("rope_type", "default")
    values[where] = draw.choice((rope, None)) if where == "rope_scaling" else rope
    return f"rope_theta={values['rope_theta']} with {where}={values[where]}"
