"""A config.json of Hugging Face's, parsed by transformers' own class and mapped to the shape of our decoder.

Defaults, old spellings and precedence of keys are left to transformers: they differ by class and by version.
Stoker maps the parsed values. A value that the decoder does not compute is refused here; a key that
transformers' class does not declare is in `unknown_keys`, and comparing logits shows whether it matters.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from stoker.conf.records import parse_json
from stoker.conf.schema import RopeParameters
from stoker.models.hugging_face import FAMILIES, ROPE_KEYS, ROPE_OPTIONS, SHAPE, SWITCHES

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
_EXPERTS_ELSEWHERE = {  # keys of models with experts that the decoder does not compute
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
    if parsed.hidden_act not in _SILU:
        raise ValueError(f"{CONFIG}: hidden_act={parsed.hidden_act}: the decoder has hidden_act=silu")
    for key in ("attention_bias", "mlp_bias", "attention_dropout"):
        if key in declared and getattr(parsed, key):
            unset = f"{key}={0.0 if key.endswith('dropout') else False}"
            raise ValueError(f"{CONFIG}: {key}={getattr(parsed, key)}: the decoder has {unset}")
    for key, why in _EXPERTS_ELSEWHERE.items():
        if key in declared and getattr(parsed, key):
            raise ValueError(f"{CONFIG}: {key}={getattr(parsed, key)}: {why}")
    if "sliding_window" in declared:
        _refuse_short_windows(parsed, seq_len)
    found = {ours: getattr(parsed, theirs) for ours, theirs in SHAPE.items()}
    if "kv_lora_rank" in FAMILIES[family].reads and parsed.num_key_value_heads != parsed.num_attention_heads:
        raise ValueError(
            f"{CONFIG}: num_key_value_heads={parsed.num_key_value_heads}: latent attention has as many as "
            f"num_attention_heads={parsed.num_attention_heads}"
        )
    return found | {
        "family": family,
        "num_key_value_heads": parsed.num_key_value_heads,
        "head_dim": getattr(parsed, "head_dim", None) or found["hidden_size"] // found["num_attention_heads"],
        **{key: FAMILIES[family].value(key, parsed) for key in SWITCHES},
        "tie_word_embeddings": parsed.tie_word_embeddings,
        **{f"rope_parameters.{key}": value for key, value in vars(rope_of(parsed)).items()},
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
    layers = getattr(parsed, "layer_types", None) or ["sliding_attention"]  # Mistral has one kind of layer
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
    """Raises ValueError for a rope_type, a key or a value that the decoder does not support."""
    given: Mapping[str, Any] = parsed.rope_parameters
    kind = given.get("rope_type")
    if kind not in ROPE_KEYS:
        raise ValueError(f"{CONFIG}: rope_type={kind!r}: known are {', '.join(ROPE_KEYS)}")
    options = [key for key in ROPE_OPTIONS.get(kind, ()) if given.get(key) is not None]
    known = ("rope_theta", *ROPE_KEYS[kind], *options)
    unused = [key for key, value in given.items() if key not in (*known, "rope_type", "type") and value is not None]
    if unused:
        raise ValueError(
            f"{CONFIG}: rope_parameters holds {unused[0]}={_short(given[unused[0]])}, which rope_type={kind} does "
            f"not have: remove it"
        )
    for key in known:
        if type(given.get(key)) not in (int, float):
            raise ValueError(f"{CONFIG}: rope_parameters: {key}={_short(given.get(key))} is not a number")
    original = given["original_max_position_embeddings"] if "original_max_position_embeddings" in known else None
    values = {key: float(given[key]) for key in known if key != "original_max_position_embeddings"}
    return RopeParameters(rope_type=kind, original_max_position_embeddings=original, **values)


def _short(value: Any, most: int = 80) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."
