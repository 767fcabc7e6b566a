"""The model that a checkpoint of Megatron's describes: the arguments of its training script, which every file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.conf.schema import ModelConfig, RopeParameters
from stoker.launch.importing.pickled import Record
from stoker.launch.importing.source import config_of
from stoker.models.hugging_face import config_json

# Arguments with another value make another model than a Llama, a Qwen2 or a Qwen3; absent ones have these.
_FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "num_experts": None,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "attention_output_gate": False,
    "window_size": None,
    "softmax_type": "vanilla",
    "qk_l2_norm": False,
    "no_rope_freq": None,
    "mtp_num_layers": None,
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "hybrid_override_pattern": None,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}
_ABSENT = {"normalization": "LayerNorm", "swiglu": False, "position_embedding_type": "learned_absolute"}
_ABSENT["add_bias_linear"] = True  # defaults of Megatron, where they are not those above
_LLAMA31: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Of config.json, and what the arguments say in ModelConfig.
_COMPARED = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}


@dataclass(frozen=True)
class Described:
    """A model, and the grid of ranks that its files are of. `given` is a config.json, if there is one."""

    model: ModelConfig
    context: int
    ranks: int  # tensor ranks
    stages: int
    given: Mapping[str, Any] | None = None

    @property
    def heads(self) -> int:
        return self.model.num_attention_heads

    @property
    def groups(self) -> int:
        return self.model.num_key_value_heads or self.heads

    @property
    def head_dim(self) -> int:
        return self.model.head_dim or 1

    @property
    def intermediate_size(self) -> int:
        return self.model.intermediate_size

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size or 1

    @property
    def tied(self) -> bool:
        return self.model.tie_word_embeddings

    @property
    def rows_of_qkv(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values in a fused matrix of all ranks."""
        return self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim

    def layers_before(self, stage: int) -> int:
        return self.model.num_hidden_layers // self.stages * stage

    def config_json(self, dtype: str) -> dict[str, Any]:
        """By `dtype`, a key of `stoker.models.hugging_face.DTYPES`, or the given one."""
        return dict(self.given) if self.given is not None else config_json(self.model, dtype, self.context, None)


def described(path: Path, held: Any, config: str | None) -> Described:
    """The model of the arguments `held` in the file `path`, with the vocabulary of `config`, a config.json, if given.

    Raises ValueError naming the file and the argument, for another kind of model and for another one than `config`.
    """
    values = {key: value for key, value in vars(held).items() if key != "made_of"} if _is_arguments(held) else None
    if values is None:
        raise ValueError(f"{path}: args are {type(held).__name__}: those of Megatron's training script are read")
    for key, value in _FIXED.items():
        found = values.get(key, _ABSENT.get(key, value))
        if found != value:
            raise ValueError(f"{path}: args have {key}={found!s:.80}: models with {key}={value} are imported")
    model, context = _model(path, values)
    stages = _number(path, values, "pipeline_model_parallel_size", 1)
    ranks = _number(path, values, "tensor_model_parallel_size", 1)
    if model.num_hidden_layers % stages:
        layers = model.num_hidden_layers
        raise ValueError(f"{path}: args have num_layers={layers} for {stages} stages: not divided evenly")
    groups = model.num_key_value_heads or model.num_attention_heads
    if groups % ranks:
        raise ValueError(f"{path}: args have {groups} query groups for {ranks} tensor ranks: each has whole groups")
    if config is None:
        return Described(model, context, ranks, stages)
    given = config_of(path.parent, config)
    return Described(_with_vocabulary(path, model, given), context, ranks, stages, given)


def _is_arguments(held: Any) -> bool:
    return isinstance(held, Record) or type(held).__name__ == "Namespace"


def _with_vocabulary(path: Path, model: ModelConfig, given: Mapping[str, Any]) -> ModelConfig:
    """`model` with the vocabulary of config.json `given`, whose other values are compared."""
    for key, ours in _COMPARED.items():
        if key in given and given[key] != getattr(model, ours):
            found = getattr(model, ours)
            raise ValueError(f"{path}: args make {key}={found} of the model, --config has {given[key]!s:.80}")
    vocabulary = given.get("vocab_size")
    if type(vocabulary) is not int or vocabulary < 1:
        raise ValueError(f"--config has vocab_size={vocabulary!s:.80}: not a whole number above 0")
    values = vars(model) | {"vocab_size": vocabulary}
    return ModelConfig(**values)


def _model(path: Path, values: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    heads, width = _number(path, values, "num_attention_heads"), _number(path, values, "hidden_size")
    grouped = values.get("group_query_attention") is True
    groups = _number(path, values, "num_query_groups") if grouped else heads
    head_dim = _number(path, values, "kv_channels", max(1, width // heads))
    if heads % groups:
        raise ValueError(f"{path}: args have num_attention_heads={heads}, no multiple of num_query_groups={groups}")
    eps = "norm_epsilon" if values.get("norm_epsilon") is not None else "layernorm_epsilon"
    rope = RopeParameters(rope_theta=_real(path, values, "rotary_base", 10000))
    if values.get("use_rope_scaling") is True:
        factor = _real(path, values, "rope_scaling_factor", 8.0)
        rope = RopeParameters("llama3", rope.rope_theta, factor, **_LLAMA31)
    vocabulary = "vocab_size" if values.get("vocab_size") is not None else "padded_vocab_size"
    model = ModelConfig(
        vocab_size=_number(path, values, vocabulary),
        hidden_size=width,
        num_hidden_layers=_number(path, values, "num_layers"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=_number(path, values, "ffn_hidden_size"),
        rms_norm_eps=_real(path, values, eps, 1e-5),
        rope_parameters=rope,
        qkv_bias=values.get("add_qkv_bias") is True,
        qk_norm=values.get("qk_layernorm") is True,
        tie_word_embeddings=values.get("untie_embeddings_and_output_weights") is not True,
    )
    return model, _number(path, values, "max_position_embeddings", 4096)


def _number(path: Path, values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise ValueError(f"{path}: args have {key}={value!s:.80}: not a whole number above 0")
    return value


def _real(path: Path, values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"{path}: args have {key}={value!s:.80}: not a number above 0")
    return float(value)
