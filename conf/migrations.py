"""What earlier versions stored, read under today's names.

A run directory and a checkpoint keep the config and the data state they were made with. What has been renamed or
removed since stands here, and nowhere else.
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
_REMOVED = {("checkpoint", "writer"): ("thread", "process")}  # key: its values, all of which computed the same
_MODES = {"index": "indexed", "lanes": "streaming"}
_STATE_KEYS = _KEYS["data"]


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a stored config under today's names. What is not old is left as it is."""
    moved = _renamed(values, _KEYS[""])
    for section, keys in _KEYS.items():
        if section and isinstance(moved.get(section), dict):
            moved[section] = _renamed(moved[section], keys)
    for section, key in (("model", "target"), ("data", "target"), ("data", "splits")):
        held = moved.get(section)
        if isinstance(held, dict) and isinstance(held.get(key), str):
            moved[section] = held | {key: _TARGETS.get(held[key], held[key])}
    for (section, key), equal in _REMOVED.items():
        held = moved.get(section)
        if isinstance(held, dict) and held.get(key) in equal:
            moved[section] = {name: value for name, value in held.items() if name != key}
    data = moved.get("data")
    if isinstance(data, dict) and data.get("mode") in _MODES:
        moved["data"] = data | {"mode": _MODES[data["mode"]]}
    return moved


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
