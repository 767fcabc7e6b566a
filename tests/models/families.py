"""Random models of Hugging Face's, as transformers itself makes and writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
PARTIAL = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
WINDOW = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FULL = {"sliding_window": 4, "layer_types": ["full_attention"] * 3}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENTS = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with scaled rotary": ("Llama", {"rope_parameters": SCALED}),
    "tied llama without groups": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "tied qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "rms_norm_eps": 1e-5}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "pad_token_id": None}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "olmo2": ("Olmo2", {"pad_token_id": None}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, **EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe with a dense layer": ("Qwen3Moe", {"head_dim": 16, **EXPERTS, "mlp_only_layers": [0]}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 3, "pad_token_id": None}),
    "deepseek_v3": ("DeepseekV3", {**LATENTS, "q_lora_rank": 24, "v_head_dim": 10}),
    "deepseek_v3 without a latent of queries": (
        "DeepseekV3",
        {**LATENTS, "q_lora_rank": None, "v_head_dim": 20, "rope_interleave": False, "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v3 with yarn": (
        "DeepseekV3",
        {
            **LATENTS,
            "q_lora_rank": 24,
            "v_head_dim": 12,
            "qk_rope_head_dim": 8,
            "max_position_embeddings": 64,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 4, "beta_slow": 1},
        },
    ),
    "qwen3 with yarn": ("Qwen3", {"head_dim": 16, "max_position_embeddings": 64, "rope_parameters": YARN}),
    "tied qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral with a window": ("Mistral", {"head_dim": 16, "sliding_window": 5}),
    "llama with linear rotary": ("Llama", {"rope_parameters": LINEAR}),
    "phi3": ("Phi3", {"pad_token_id": None, "rope_parameters": PARTIAL, "sliding_window": 5}),
    "phi3 with factors": (
        "Phi3",
        {
            "pad_token_id": None,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                **PARTIAL,
                "rope_type": "longrope",
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 3.0],
            },
        },
    ),
    "phi3 without a window": ("Phi3", {"pad_token_id": None, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 5,
            "pad_token_id": None,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
            **WINDOW,
        },
    ),
    "gemma3 of full attention": ("Gemma3", {"head_dim": 8, "query_pre_attn_scalar": 8, "pad_token_id": None, **FULL}),
}
CONFIGS = {"Gemma3": "Gemma3Text"}  # where a config is called otherwise than its model
VOCABULARY = 320  # of the byte tokenizer


def write_family(folder: Path, case: str, dtype: str = "float32", **changes: Any) -> Any:
    """Write a random model of `case` to `folder`; the model."""
    import torch
    import transformers

    family, values = FAMILIES[case]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{CONFIGS.get(family, family)}Config")(**(shape | values | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)  # norms and biases: nothing hides behind a one
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder)
    return model
