"""The decoder family in Hugging Face's format: the names of tensors, and config.json for export.

Of weights only those of experts change their layout (`stoker.models.hugging_face_experts`): `stoker.models.rope` pairs
channels as Hugging Face's models do, and queries, keys and values are separate tensors on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stoker.conf.schema import ModelConfig
from stoker.models.attention import head_dim_of, scale_of
from stoker.models.feed_forward import expert_width
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
ROPE_KEYS: dict[str, tuple[str, ...]] = {  # of each rope_type, beside rope_theta
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
ROPE_OPTIONS = {"yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}  # which may be absent


@dataclass(frozen=True)
class Family:
    """An architecture of Hugging Face's that is a case of our decoder.

    Of the `SWITCHES` it has the values `always`, and any value of those that it `reads` from its config.json; all
    others are off.
    """

    architecture: str
    always: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    pads: bool = False  # by default with a token that small vocabularies lack
    sparse: bool = False  # with experts
    needs: tuple[str, ...] = ()  # of `reads`, what is not off
    names: Mapping[str, str] = field(default_factory=dict)  # of `reads` in config.json, where they are others

    @property
    def all_sparse(self) -> bool:
        """Whether every layer has experts, as wide as its config's intermediate_size."""
        return self.sparse and "moe_intermediate_size" not in self.reads

    def value(self, key: str, parsed: Any) -> Any:
        """That of the switch `key` in a config of transformers'. Raises ValueError."""
        if key not in self.reads:
            return self.always.get(key, SWITCHES[key])
        if key in _FROM_LISTS and key not in self.names:
            return _FROM_LISTS[key](parsed)
        found = getattr(parsed, self.names.get(key, key))
        if key in self.needs and not found:
            raise ValueError(f"config.json: {self.names.get(key, key)}={found}: the decoder has it above 0")
        return float(found) if key in _FACTORS else found

    def fits(self, config: ModelConfig) -> bool:
        if self.sparse != (config.num_experts > 0) or not all(getattr(config, key) for key in self.needs):
            return False
        return all(
            getattr(config, key) == self.always.get(key, off)
            for key, off in SWITCHES.items()
            if key not in self.reads and not (self.all_sparse and key == "moe_intermediate_size")
        )


# Keys of ModelConfig in which the families differ, with the values of a Llama.
_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_SHAPES = ("qkv_bias", "qk_norm", "qk_norm_over", "norm_placement", "nope_layers")
_EXPERTS = (
    *("num_experts", "num_experts_per_tok", "num_shared_experts", "first_dense_layers", "router"),
    *("norm_topk_prob", "moe_intermediate_size", "router_bias"),
)
_GROUPS = ("n_group", "topk_group", "routed_scaling_factor")
_LATENTS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave")
_FACTORS = (*_MULTIPLIERS, "routed_scaling_factor")
SWITCHES = {key: getattr(ModelConfig(), key) for key in (*_SHAPES, *_MULTIPLIERS, *_EXPERTS, *_GROUPS, *_LATENTS)}
_CHOICE = ("num_experts", "num_experts_per_tok")
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}),
    "smollm3": Family("SmolLM3ForCausalLM", reads=("nope_layers",), pads=True),
    "granite": Family("GraniteForCausalLM", reads=_MULTIPLIERS),
    "olmo2": Family(
        "Olmo2ForCausalLM", {"qk_norm": True, "qk_norm_over": "projection", "norm_placement": "after"}, pads=True
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"qk_norm": True},
        (*_CHOICE, "norm_topk_prob", "moe_intermediate_size", "first_dense_layers"),
        sparse=True,
    ),
    "mixtral": Family("MixtralForCausalLM", reads=_CHOICE, sparse=True, names={"num_experts": "num_local_experts"}),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {"qk_norm": True, "qk_norm_over": "projection"},
        (*_CHOICE, "norm_topk_prob"),
        pads=True,
        sparse=True,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {"router": "sigmoid", "router_bias": True},
        (
            *_CHOICE,
            *("norm_topk_prob", "moe_intermediate_size", "first_dense_layers", "num_shared_experts"),
            *_GROUPS,
            *_LATENTS,
        ),
        sparse=True,
        names={
            "num_experts": "n_routed_experts",
            "num_shared_experts": "n_shared_experts",
            "first_dense_layers": "first_k_dense_replace",
        },
        needs=("num_shared_experts", "kv_lora_rank"),
    ),
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


def family_of(config: ModelConfig) -> str:
    """The family that `config` belongs to: `model.family`, else the first that has its switches.

    Raises ValueError when there is none, or when `model.family` has others.
    """
    fitting = [name for name, family in FAMILIES.items() if family.fits(config)]
    if config.family is None and fitting:
        return fitting[0]
    if config.family in fitting:
        return config.family
    on = {key: getattr(config, key) for key, off in SWITCHES.items() if getattr(config, key) != off}
    shown = on or {key: SWITCHES[key] for key in FAMILIES[str(config.family)].always}
    what = " with ".join(f"model.{key}={value}" for key, value in shown.items())
    if not fitting:
        raise ValueError(f"no architecture of Hugging Face's has {what}")
    verb = "does" if len(fitting) == 1 else "do"
    raise ValueError(f"model.family={config.family} does not have {what}: {' and '.join(fitting)} {verb}")


def config_json(config: ModelConfig, dtype: str, context: int, end_of_document: int | None) -> dict[str, Any]:
    """The config.json of `config`, whose `vocab_size` is known. `dtype` is one of DTYPES, `context` counts tokens.

    Raises ValueError for a shape that no family has.
    """
    rope = rope_parameters(config)
    scaled = config.rope_parameters.rope_type != "default"
    values = _architecture(config) | {
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "sliding_window": None,
        "use_cache": True,
        "rope_parameters": rope,  # transformers 5; what follows are the names of transformers 4
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None,
        "bos_token_id": None,
        "eos_token_id": end_of_document,
        "dtype": DTYPES[dtype],
        "torch_dtype": DTYPES[dtype],
    }
    if FAMILIES[values["model_type"]].pads:
        values["pad_token_id"] = None
    if "kv_lora_rank" in values:  # of DeepSeek's: without layers that predict further tokens
        values["num_nextn_predict_layers"] = 0
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
        values |= {"model_type": family, "architectures": theirs["architectures"], **_switches(config)}
    if any(before[key] != getattr(config, key) for key in FAMILIES[family].reads):
        values |= _switches(config)
    rope_before = {key.partition(".")[2]: value for key, value in base_shape.items() if key not in before}
    if rope_before != vars(config.rope_parameters):
        for old in ("rope_theta", "rope_scaling"):
            values.pop(old, None)
        values["rope_parameters"] = rope_parameters(config)
    if not same_dtype:
        for key in [key for key in ("dtype", "torch_dtype") if key in values] or ["dtype"]:
            values[key] = DTYPES[dtype]
    return values


_MORE = {
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tie_word_embeddings",
}


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """The dict of transformers 5: only the keys of its rope_type."""
    rope = config.rope_parameters
    keys = ("rope_type", "rope_theta", *ROPE_KEYS[rope.rope_type])
    options = {key: getattr(rope, key) for key in ROPE_OPTIONS.get(rope.rope_type, ())}
    return {key: getattr(rope, key) for key in keys} | {k: v for k, v in options.items() if v is not None}


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """The shape of the model, except its rotary embedding, by transformers' names."""
    family = family_of(config)
    values = _ours(config)
    return {name: values[key] for key, name in {**SHAPE, **_MORE}.items()} | {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        **_switches(config),
    }


def _switches(config: ModelConfig) -> dict[str, Any]:
    """The switches of config.json that the family of `config` reads."""
    own = vars(config) | {"attention_multiplier": scale_of(config), "moe_intermediate_size": expert_width(config)}
    family = FAMILIES[family_of(config)]
    values = {family.names.get(key, key): own[key] for key in family.reads}
    if "nope_layers" in values:
        nope = values.pop("nope_layers")
        values["no_rope_layers"] = [int(number not in nope) for number in range(config.num_hidden_layers)]
    if "first_dense_layers" in values:
        values["mlp_only_layers"] = list(range(values.pop("first_dense_layers")))
    return values


def _nope_layers(parsed: Any) -> list[int]:
    """Numbers of the layers without rotary embedding. Their list holds 1 for a layer with it."""
    flags, layers = parsed.no_rope_layers, parsed.num_hidden_layers
    if len(flags) < layers:
        raise ValueError(f"config.json: no_rope_layers={flags} has {len(flags)} values for {layers} layers")
    return [number for number in range(layers) if not flags[number]]


def _first_dense_layers(parsed: Any) -> int:
    """How many layers come before the first with experts. Raises ValueError for dense layers elsewhere."""
    dense, step = sorted(set(parsed.mlp_only_layers)), parsed.decoder_sparse_step
    if step != 1:
        raise ValueError(f"config.json: decoder_sparse_step={step}: the decoder has experts in every layer from one on")
    if dense != list(range(len(dense))):
        raise ValueError(f"config.json: mlp_only_layers={dense}: the decoder's dense layers are its first")
    return len(dense)


_FROM_LISTS: dict[str, Callable[[Any], Any]] = {
    "nope_layers": _nope_layers,
    "first_dense_layers": _first_dense_layers,
}


def _ours(config: ModelConfig) -> dict[str, Any]:
    own = vars(config) | {
        "num_key_value_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": head_dim_of(config),
    }
    return own | {"intermediate_size": expert_width(config)} if FAMILIES[family_of(config)].all_sparse else own
