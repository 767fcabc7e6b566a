"""The architectures of Hugging Face's that are cases of our decoder, and how each writes what they differ in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stoker.conf.schema import ModelConfig
from stoker.models.attention import scale_of
from stoker.models.feed_forward import expert_width

ROPE_KEYS: dict[str, tuple[str, ...]] = {  # of each rope_type, beside rope_theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
LONGROPE = "longrope"  # is read, and not written: a run has no factors beyond the original context
ROPE_OPTIONS = {"yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}  # which may be absent

_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_SHAPES = ("qkv_bias", "qk_norm", "qk_norm_over", "norm_placement", "zero_centered_norm", "hidden_act", "nope_layers")
_WINDOWS = ("sliding_window", "full_attention_layers", "sliding_rope_theta")
_EXPERTS = (
    *("num_experts", "num_experts_per_tok", "num_shared_experts", "first_dense_layers", "router"),
    *("norm_topk_prob", "moe_intermediate_size", "router_bias"),
)
_GROUPS = ("n_group", "topk_group", "routed_scaling_factor")
_LATENTS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave")
_FACTORS = (*_MULTIPLIERS, "routed_scaling_factor")
_KEYS = (*_SHAPES, "partial_rotary_factor", *_WINDOWS, *_MULTIPLIERS, *_EXPERTS, *_GROUPS, *_LATENTS)
# Keys of ModelConfig in which the families differ, with the values of a Llama.
SWITCHES = {key: getattr(ModelConfig(), key) for key in _KEYS}


@dataclass(frozen=True)
class Family:
    """An architecture of Hugging Face's that is a case of our decoder.

    Of the `SWITCHES` it has the values `always`, or what a function there makes of its shape, and any value of those
    that it `reads` from its config.json; all others are off.
    """

    architecture: str
    always: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    pads: bool = False  # by default with a token that small vocabularies lack, or that is not trained
    sparse: bool = False  # with experts
    needs: tuple[str, ...] = ()  # of `reads`, what is not off
    names: Mapping[str, str] = field(default_factory=dict)  # of `reads` in config.json, where they are others
    fused: bool = False  # queries, keys and values are one matrix in its files, and gate and up another
    ropes: tuple[str, ...] = tuple(ROPE_KEYS)

    @property
    def all_sparse(self) -> bool:
        """Whether every layer has experts, as wide as its config's intermediate_size."""
        return self.sparse and "moe_intermediate_size" not in self.reads

    def value(self, key: str, parsed: Any) -> Any:
        """That of the switch `key` in a config of transformers'. Raises ValueError."""
        if key not in self.reads:
            return self._fixed(key, parsed)
        name = self.names.get(key, key)
        found = _READ[name](parsed) if name in _READ else getattr(parsed, name)
        if key in self.needs and not found:
            raise ValueError(f"config.json: {name}={found}: the decoder has it above 0")
        return float(found) if key in _FACTORS else found

    def written(self, config: ModelConfig) -> dict[str, Any]:
        """The switches that it reads, by the names of its config.json. Raises ValueError for what they cannot hold."""
        own = vars(config) | {"attention_multiplier": scale_of(config), "moe_intermediate_size": expert_width(config)}
        values: dict[str, Any] = {}
        for key in self.reads:
            name = self.names.get(key, key)
            values |= _WRITTEN[name](config) if name in _WRITTEN else {name: own[key]}
        return values

    def fits(self, config: ModelConfig) -> bool:
        if self.sparse != (config.num_experts > 0) or not all(getattr(config, key) for key in self.needs):
            return False
        return config.rope_parameters.rope_type in self.ropes and all(
            getattr(config, key) == self._fixed(key, config)
            for key in SWITCHES
            if key not in self.reads and not (self.all_sparse and key == "moe_intermediate_size")
        )

    def _fixed(self, key: str, shape: Any) -> Any:
        found = self.always.get(key, SWITCHES[key])
        return found(shape) if callable(found) else found


def _root_of_width(shape: Any) -> float:
    return float(shape.hidden_size**0.5)


_CHOICE = ("num_experts", "num_experts_per_tok")
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", reads=("sliding_window",)),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}),
    "smollm3": Family("SmolLM3ForCausalLM", reads=("nope_layers",), pads=True),
    "granite": Family("GraniteForCausalLM", reads=_MULTIPLIERS),
    "olmo2": Family(
        "Olmo2ForCausalLM", {"qk_norm": True, "qk_norm_over": "projection", "norm_placement": "after"}, pads=True
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        reads=("sliding_window", "partial_rotary_factor"),
        pads=True,
        fused=True,
        ropes=("default", LONGROPE),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            "qk_norm": True,
            "norm_placement": "both",
            "zero_centered_norm": True,
            "embedding_multiplier": _root_of_width,
        },
        (*_WINDOWS, "hidden_act", "attention_multiplier"),
        pads=True,
        needs=("sliding_window",),
        names={"hidden_act": "hidden_activation", "attention_multiplier": "query_pre_attn_scalar"},
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


def _sliding_window(parsed: Any) -> int | None:
    window: int | None = parsed.sliding_window
    if window is not None and window < 1:
        raise ValueError(f"config.json: sliding_window={window}: a token sees itself at least")
    return window


_KINDS = ("sliding_attention", "full_attention")


def _full_attention_layers(parsed: Any) -> list[int]:
    kinds, layers = parsed.layer_types, parsed.num_hidden_layers
    strange = sorted(set(kinds) - set(_KINDS))
    if strange or len(kinds) < layers:
        what = f"{strange[0]}" if strange else f"{len(kinds)} values for {layers} layers"
        raise ValueError(f"config.json: layer_types holds {what}: the decoder has {' and '.join(_KINDS)}")
    return [number for number in range(layers) if kinds[number] == "full_attention"]


def _layer_types(config: ModelConfig) -> dict[str, Any]:
    full = config.full_attention_layers
    return {"layer_types": [_KINDS[number in full] for number in range(config.num_hidden_layers)]}


def _sliding_rope_theta(parsed: Any) -> float:
    """Raises ValueError for layers with a window whose rotary embedding is scaled."""
    rope = parsed.rope_parameters["sliding_attention"]
    if rope.get("rope_type") != "default":
        raise ValueError(
            f"config.json: rope_parameters: rope_type={rope.get('rope_type')!r} of sliding_attention: the decoder has "
            "rope_type=default there"
        )
    return float(rope["rope_theta"])


def _hidden_activation(parsed: Any) -> str:
    found, known = parsed.hidden_activation, ("silu", "gelu_pytorch_tanh")
    if found not in known:
        raise ValueError(f"config.json: hidden_activation={found}: the decoder has {' and '.join(known)}")
    return str(found)


def _query_pre_attn_scalar(config: ModelConfig) -> dict[str, Any]:
    scale = scale_of(config)
    scalar = round(scale**-2)
    if scalar < 1 or scalar**-0.5 != scale:
        raise ValueError(
            f"model.attention_multiplier={scale}: Gemma 3's is 1 / sqrt(n) of a whole number n, such as {scalar**-0.5}"
        )
    return {"query_pre_attn_scalar": scalar}


# By the name in config.json, where a value is not just copied; what is written elsewhere adds nothing.
_READ: dict[str, Callable[[Any], Any]] = {
    "nope_layers": _nope_layers,
    "first_dense_layers": _first_dense_layers,
    "sliding_window": _sliding_window,
    "full_attention_layers": _full_attention_layers,
    "sliding_rope_theta": _sliding_rope_theta,
    "hidden_activation": _hidden_activation,
    "query_pre_attn_scalar": lambda parsed: parsed.query_pre_attn_scalar**-0.5,
    "partial_rotary_factor": lambda parsed: float(parsed.rope_parameters["partial_rotary_factor"]),
}
_WRITTEN: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "nope_layers": lambda config: {
        "no_rope_layers": [int(number not in config.nope_layers) for number in range(config.num_hidden_layers)]
    },
    "first_dense_layers": lambda config: {"mlp_only_layers": list(range(config.first_dense_layers))},
    "full_attention_layers": _layer_types,
    "query_pre_attn_scalar": _query_pre_attn_scalar,
    "sliding_rope_theta": lambda config: {},  # in rope_parameters, as the next
    "partial_rotary_factor": lambda config: {},
}


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
    kind = config.rope_parameters.rope_type
    if config.family is not None and kind not in FAMILIES[config.family].ropes:
        on["rope_parameters.rope_type"] = kind
    shown = on or {key: SWITCHES[key] for key in FAMILIES[str(config.family)].always}
    what = " with ".join(f"model.{key}={value}" for key, value in shown.items())
    if not fitting:
        raise ValueError(f"no architecture of Hugging Face's has {what}")
    verb = "does" if len(fitting) == 1 else "do"
    raise ValueError(f"model.family={config.family} does not have {what}: {' and '.join(fitting)} {verb}")


def is_fused(config: ModelConfig) -> bool:
    """Whether its files hold queries, keys and values in one matrix. False for a model that is not exported."""
    try:
        return FAMILIES[family_of(config)].fused
    except ValueError:
        return False


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """The dict of transformers 5: only the keys of its rope_type. That of layers without a window."""
    rope = config.rope_parameters
    keys = ("rope_type", "rope_theta", *ROPE_KEYS[rope.rope_type])
    options = {key: getattr(rope, key) for key in ROPE_OPTIONS.get(rope.rope_type, ())}
    return {key: getattr(rope, key) for key in keys} | {k: v for k, v in options.items() if v is not None}


def written_rope(config: ModelConfig) -> dict[str, Any]:
    """config.json's `rope_parameters`, and the names of transformers 4 for the same."""
    if config.rope_parameters.rope_type == LONGROPE:
        raise ValueError("model.rope_parameters: rope_type=longrope is exported with the config.json it came with only")
    reads, rope = FAMILIES[family_of(config)].reads, rope_parameters(config)
    if "partial_rotary_factor" in reads:
        rope["partial_rotary_factor"] = config.partial_rotary_factor
    scaled = config.rope_parameters.rope_type != "default"
    older: dict[str, Any] = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None,
    }
    if "sliding_rope_theta" not in reads:
        return {"rope_parameters": rope, **older}
    if scaled and config.sliding_rope_theta is None:
        raise ValueError(
            f"model.sliding_rope_theta=null with rope_type={rope['rope_type']}: Gemma 3's layers with a window have an "
            "unscaled rotary embedding"
        )
    local = config.sliding_rope_theta or rope["rope_theta"]
    both = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return {"rope_parameters": both, **older, "rope_local_base_freq": local}
