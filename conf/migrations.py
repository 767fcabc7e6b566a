"""Configs that were stored by earlier versions, read as configs of this one.

A run directory and a checkpoint keep the config they were made with. What has been renamed since stands here, and
nowhere else.
"""

from __future__ import annotations

from typing import Any

_TARGETS = {
    f"{module}:{name}": f"stoker.{module}:{name}"
    for module, name in (
        ("models.decoder", "build"),
        ("data.stdlib", "open_source"),
        ("data.text", "open_source"),
        ("data.chat", "open_source"),
        ("data.token_files", "open_source"),
        ("data.lanes.sources", "open_text"),
        ("data.lanes.sources", "streamed_only"),
        ("data.lanes.tables", "open_hf"),
        ("data.lanes.webdataset", "open_webdataset"),
    )
}
_ROPE_SCALING = {  # old key -> new key and the old default
    "factor": ("factor", 1.0),
    "low_frequency_factor": ("low_freq_factor", 1.0),
    "high_frequency_factor": ("high_freq_factor", 4.0),
    "original_context": ("original_max_position_embeddings", 8192),
}
_HOLD_TARGETS = (("model", "target"), ("data", "target"), ("data", "units"))


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a stored config under today's names. What is not old is left as it is."""
    moved = dict(values)
    for section, key in _HOLD_TARGETS:
        held = moved.get(section)
        if isinstance(held, dict) and isinstance(held.get(key), str):
            moved[section] = held | {key: _TARGETS.get(held[key], held[key])}
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
