"""A config.json of Hugging Face's, parsed by transformers' own class and mapped to the shape of our decoder.

Defaults, old spellings and precedence of keys are left to transformers: they differ by class and by version.
Stoker maps the parsed values. A value that the decoder does not compute is refused here; a key that
transformers' class does not declare is in `unknown_keys`, and comparing logits shows whether it matters.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from stoker.conf.records import parse_json
from stoker.conf.schema import RopeParameters
from stoker.models.hugging_face import SHAPE
from stoker.models.hugging_face_families import FAMILIES, LONGROPE, ROPE_KEYS, ROPE_OPTIONS, SWITCHES

log = logging.getLogger(__name__)

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
_SILU = ("silu", "swish")  # two names of one function
# Keys that transformers acts on before any class of a model reads them.
_ELSEWHERE = {
    "auto_map": "the model needs code from its folder, which is not run",
    "configuration_files": "another file of the folder holds the config of this version of transformers",
    "transformers_weights": "it names the file of the weights",
    "per_layer_config": "layers of different shapes are not built",
    "quantization_config": "quantised weights are not read",
    "compression_config": "quantised weights are not read",
}
_ELSEWHERE_COMPUTED = {  # keys of a class of transformers' that the decoder does not compute
    "attn_logit_softcapping": "the decoder has attn_logit_softcapping=null",
    "final_logit_softcapping": "the decoder has final_logit_softcapping=null",
    "use_bidirectional_attention": "the decoder has use_bidirectional_attention=false",
    "clip_qkv": "the decoder has clip_qkv=null",
    "router_jitter_noise": "the decoder has router_jitter_noise=0.0",
    "output_router_logits": "transformers adds a loss of micro-batches to balance experts, whose value depends on how "
    "a batch is divided: output_router_logits=false works",
}
_OLD_SPELLINGS = {"rope_theta", "rope_scaling", "torch_dtype", "num_labels", "_name_or_path", "name_or_path"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, and ValueError naming the file when it holds something else."""
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not a JSON object")
    return values


def parse(folder: Path) -> Any:
    """transformers' config object of `folder`, of one of our FAMILIES.

    Raises ValueError for another family, for keys that lead away from this file, and for what transformers refuses.
    """
    values = read_json(folder / CONFIG)
    family = values.get("model_type")
    if family not in FAMILIES:
        known = sorted(FAMILIES, key=lambda name: -difflib.SequenceMatcher(None, str(family), name).ratio())
        raise ValueError(f"{CONFIG}: model_type={family!r}: known are {', '.join(known)}")
    return parsed(folder)


def parsed(folder: Path) -> Any:
    """transformers' config object of `folder`, of any model. Raises ValueError as `parse`."""
    own_values(folder)
    with quiet_transformers():
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of many kinds, some of them transformers' own
            raise ValueError(f"{CONFIG}: transformers cannot read it: {in_one_line(error)}") from error


def own_values(folder: Path) -> dict[str, Any]:
    """The values of config.json. Raises ValueError for an adapter's folder, and for keys that lead away from it."""
    values = read_json(folder / CONFIG)
    refuse_leading_away(values)
    if (folder / ADAPTER).exists():
        raise ValueError(f"{ADAPTER}: the folder holds an adapter: merge it into the model's weights first")
    return values


def refuse_leading_away(values: Mapping[str, Any]) -> None:
    """Raises ValueError for keys of a config.json by which transformers would read or run something else."""
    for key, why in _ELSEWHERE.items():
        if values.get(key):
            raise ValueError(f"{CONFIG}: {key}={_short(values[key])}: {why}")


def warn_untied(folder: Path, head: str) -> None:
    log.warning("%s: %s is not the embedding: the model is not tied, as in transformers", folder, head)


def shape_of(parsed: Any, seq_len: int) -> dict[str, Any]:
    """`parsed` as values of a `ModelConfig` by key (`rope_parameters.factor`), for sequences of `seq_len` tokens.

    Raises ValueError naming the key of config.json that our decoder does not compute.
    """
    family = parsed.model_type
    declared = {field.name for field in fields(type(parsed))}
    reads = FAMILIES[family].reads
    if "hidden_act" not in reads and parsed.hidden_act not in _SILU:
        raise ValueError(f"{CONFIG}: hidden_act={parsed.hidden_act}: the decoder has hidden_act=silu")
    for key in ("attention_bias", "mlp_bias", "attention_dropout", "resid_pdrop", "embd_pdrop"):
        if key in declared and getattr(parsed, key):
            unset = f"{key}={0.0 if key.endswith('drop') or key.endswith('dropout') else False}"
            raise ValueError(f"{CONFIG}: {key}={getattr(parsed, key)}: the decoder has {unset}")
    for key, why in _ELSEWHERE_COMPUTED.items():
        if key in declared and getattr(parsed, key):
            raise ValueError(f"{CONFIG}: {key}={getattr(parsed, key)}: {why}")
    if "sliding_window" in declared and "sliding_window" not in reads:
        _refuse_short_windows(parsed, seq_len)
    found = {ours: getattr(parsed, theirs) for ours, theirs in SHAPE.items()}
    if "kv_lora_rank" in reads and parsed.num_key_value_heads != parsed.num_attention_heads:
        raise ValueError(
            f"{CONFIG}: num_key_value_heads={parsed.num_key_value_heads}: latent attention has as many as "
            f"num_attention_heads={parsed.num_attention_heads}"
        )
    rope = rope_of(parsed)
    if rope.rope_type == LONGROPE and seq_len > (rope.original_max_position_embeddings or 0):
        raise ValueError(
            f"{CONFIG}: rope_type=longrope: beyond original_max_position_embeddings="
            f"{rope.original_max_position_embeddings} its factors go by the longest document of a batch, and the "
            f"decoder's do not: seq_len={rope.original_max_position_embeddings} works"
        )
    return found | {
        "family": family,
        "num_key_value_heads": parsed.num_key_value_heads,
        "head_dim": getattr(parsed, "head_dim", None) or found["hidden_size"] // found["num_attention_heads"],
        **{key: FAMILIES[family].value(key, parsed) for key in SWITCHES},
        "tie_word_embeddings": parsed.tie_word_embeddings,
        **{f"rope_parameters.{key}": value for key, value in vars(rope).items()},
    }


def unknown_keys(folder: Path, parsed: Any) -> list[str]:
    """Keys of the folder's config.json that transformers' class does not declare."""
    from transformers import GenerationConfig

    declared = {field.name for field in fields(type(parsed))} | set(GenerationConfig().to_dict())
    return sorted(set(read_json(folder / CONFIG)) - declared - _OLD_SPELLINGS - {"model_type"})


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and warnings: the relevant conditions are refused here by name."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def in_one_line(error: BaseException) -> str:
    return _short(" ".join(str(error).split()) or type(error).__name__, 300)


def _refuse_short_windows(parsed: Any, seq_len: int) -> None:
    """Attention in a window is causal attention only where the whole sequence fits into it."""
    layers = getattr(parsed, "layer_types", None) or ["sliding_attention"]  # experts' families have one kind of layer
    strange = sorted(set(layers) - {"full_attention", "sliding_attention"})
    if strange:
        raise ValueError(f"{CONFIG}: layer_types holds {strange[0]}: the decoder has full_attention")
    window = parsed.sliding_window if "sliding_attention" in layers else None
    if window is not None and window < seq_len:
        raise ValueError(
            f"{CONFIG}: sliding_window={window}: the decoder attends to the whole sequence of {seq_len} tokens; "
            f"seq_len={window} works"
        )


def rope_of(parsed: Any) -> RopeParameters:
    """That of layers without a window. Raises ValueError for a rope_type, a key or a value that the decoder lacks."""
    family = FAMILIES.get(parsed.model_type)
    reads = () if family is None else family.reads
    given: dict[str, Any] = dict(parsed.rope_parameters)
    if "sliding_rope_theta" in reads:
        given = dict(given["full_attention"])
    if "partial_rotary_factor" in reads:
        given.pop("partial_rotary_factor")
    kind, known = given.get("rope_type"), tuple(ROPE_KEYS) if family is None else family.ropes
    if kind not in known:
        raise ValueError(f"{CONFIG}: rope_type={kind!r}: known are {', '.join(known)}")
    if kind == LONGROPE:
        return _longrope(parsed, given)
    options = [key for key in ROPE_OPTIONS.get(kind, ()) if given.get(key) is not None]
    keys = ("rope_theta", *ROPE_KEYS[kind], *options)
    unused = [key for key, value in given.items() if key not in (*keys, "rope_type", "type") and value is not None]
    if unused:
        raise ValueError(
            f"{CONFIG}: rope_parameters holds {unused[0]}={_short(given[unused[0]])}, which rope_type={kind} does "
            f"not have: remove it"
        )
    for key in keys:
        if type(given.get(key)) not in (int, float):
            raise ValueError(f"{CONFIG}: rope_parameters: {key}={_short(given.get(key))} is not a number")
    original = given["original_max_position_embeddings"] if "original_max_position_embeddings" in keys else None
    values: dict[str, Any] = {key: float(given[key]) for key in keys if key != "original_max_position_embeddings"}
    return RopeParameters(rope_type=kind, original_max_position_embeddings=original, **values)


def _longrope(parsed: Any, given: Mapping[str, Any]) -> RopeParameters:
    """With the factors of the original context, which transformers' class computes with up to its end."""
    original, short = given.get("original_max_position_embeddings"), given.get("short_factor")
    scale, extension = given.get("attention_factor"), given.get("factor")
    if type(original) is not int or original < 2 or not isinstance(short, list):
        raise ValueError(f"{CONFIG}: rope_parameters: short_factor and original_max_position_embeddings are missing")
    if extension is None:
        extension = parsed.max_position_embeddings / original
    if scale is None:  # as transformers has it
        scale = 1.0 if extension <= 1 else math.sqrt(1 + math.log(extension) / math.log(original))
    return RopeParameters(
        rope_type=LONGROPE,
        rope_theta=float(given["rope_theta"]),
        original_max_position_embeddings=original,
        short_factor=[float(factor) for factor in short],
        attention_factor=float(scale),
    )


def _short(value: Any, most: int = 80) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."
