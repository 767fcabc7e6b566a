"""What earlier versions stored, read under today's names.

A run directory and a checkpoint keep the config and the data state they were made with. Only this module lists the
keys that were renamed or removed since.
"""

from __future__ import annotations

from typing import Any

# Import paths of our own, from before the rooms were imported as `stoker.ROOM` and `lanes` became `streaming`.
_TARGETS = {
    "models.decoder:build": "stoker.models.decoder:build",
    "data.stdlib:open_source": "stoker.data.stdlib:open_source",
    "data.text:open_source": "stoker.data.text:open_source",
    "data.chat:open_source": "stoker.data.chat:open_source",
    "data.token_files:open_source": "stoker.data.token_files:open_source",
    "data.lanes.sources:open_text": "stoker.data.streaming.sources:open_text",
    "data.lanes.sources:streamed_only": "stoker.data.streaming.sources:streamed_only",
    "data.lanes.tables:open_hf": "stoker.data.streaming.tables:open_hf",
    "data.lanes.webdataset:open_webdataset": "stoker.data.streaming.webdataset:open_webdataset",
}
_KEYS = {
    "": {"clip_norm": "grad_clip_norm", "activation_checkpoint": "activation_checkpointing"},
    "batch": {"rows": "size", "micro": "micro_size"},
    "parallel": {"sequence": "sequence_parallel", "replicas": "dp_replicate"},
    "model": {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "hidden": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "init_std": "initializer_range",
        "tie_embeddings": "tie_word_embeddings",
    },
    "data": {
        "planner": "mode",
        "lanes": "streams",
        "window": "shuffle_window",
        "units": "splits",
        "unit_bytes": "split_bytes",
        "deal_every": "assign_every",
    },
    "eval": {"rows": "sequences"},
}
_ROPE_SCALING = {  # old key -> new key and the old default
    "factor": ("factor", 1.0),
    "low_frequency_factor": ("low_freq_factor", 1.0),
    "high_frequency_factor": ("high_freq_factor", 4.0),
    "original_context": ("original_max_position_embeddings", 8192),
}
_REMOVED = {("checkpoint", "writer"): ("thread", "process")}  # key: its values, all of which computed the same
_ADDED = {  # keys that are new, with the value by which the versions before them computed
    ("data", "validation_by"): "documents",
    ("eval", "seed"): None,
}
_MODES = {"index": "indexed", "lanes": "streaming"}
_STATE_KEYS = _KEYS["data"]


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a stored config under today's names. What is not old is left as it is."""
    moved = _renamed(values, _KEYS[""])
    for section, keys in _KEYS.items():
        if section and isinstance(moved.get(section), dict):
            moved[section] = _renamed(moved[section], keys)
    if isinstance(moved.get("data"), dict):
        moved["data"] = _with_stated_width(moved["data"])
    for section, key in (("model", "target"), ("data", "target"), ("data", "splits")):
        held = moved.get(section)
        if isinstance(held, dict) and isinstance(held.get(key), str):
            moved[section] = held | {key: _TARGETS.get(held[key], held[key])}
    for (section, key), value in _ADDED.items():
        held = moved.get(section)
        if isinstance(held, dict) and key not in held:
            moved[section] = held | {key: value}
    for (section, key), equal in _REMOVED.items():
        held = moved.get(section)
        if isinstance(held, dict) and held.get(key) in equal:
            moved[section] = {name: value for name, value in held.items() if name != key}
    data = moved.get("data")
    if isinstance(data, dict) and data.get("mode") in _MODES:
        moved["data"] = data | {"mode": _MODES[data["mode"]]}
    if isinstance(moved.get("model"), dict):
        moved["model"] = _with_rope_parameters(moved["model"])
    return moved


def _with_rope_parameters(model: dict[str, Any]) -> dict[str, Any]:
    """`model` with the dict of transformers 5 in the place of `rope_theta` and `rope_scaling`."""
    kept = {key: value for key, value in model.items() if key not in ("rope_theta", "rope_scaling")}
    rope = {"rope_theta": model["rope_theta"]} if "rope_theta" in model else {}
    scaling = model.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("factor", 1.0) != 1.0:  # at 1 scaling was off
        values = {new: scaling.get(old, default) for old, (new, default) in _ROPE_SCALING.items()}
        rope |= {"rope_type": "llama3", **values}
    return kept | ({"rope_parameters": rope} if rope else {})


def migrate_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint under today's names: its config, and the fingerprint of its data."""
    moved = dict(state)
    if isinstance(state.get("config"), dict):
        moved["config"] = migrate(state["config"])
    data = state.get("data")
    if isinstance(data, dict) and isinstance(data.get("fingerprint"), dict):
        moved["data"] = data | {"fingerprint": _migrate_fingerprint(data["fingerprint"])}
    return moved


def _migrate_fingerprint(values: dict[str, Any]) -> dict[str, Any]:
    """Keys of a mixture's sources are `NAME.key`."""
    moved = {}
    for key, value in values.items():
        source, dot, name = key.rpartition(".")
        moved[source + dot + _STATE_KEYS.get(name, name)] = value
    return moved | ({"mode": _MODES[moved["mode"]]} if moved.get("mode") in _MODES else {})


def _renamed(values: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    return {keys.get(key, key): value for key, value in values.items()}


def _with_stated_width(data: dict[str, Any]) -> dict[str, Any]:
    """`data` of a stored config. Versions whose targets had bare names read token files without a header as uint16."""
    if str(data.get("target")) not in _TARGETS:
        return data
    moved = dict(data)
    if data["target"] == "data.token_files:open_source":
        moved["args"] = {"dtype": "uint16"} | (data.get("args") or {})
    if isinstance(data.get("sources"), dict):
        moved["sources"] = {
            name: source | {"args": {"dtype": "uint16"} | (source.get("args") or {})}
            if isinstance(source, dict) and source.get("kind") == "tokens"
            else source
            for name, source in data["sources"].items()
        }
    return moved
