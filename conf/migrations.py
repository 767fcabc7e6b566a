"""Configs that were stored by earlier versions, read as configs of this one.

A run directory and a checkpoint keep the config they were made with. What has been renamed or removed since stands
here, and nowhere else.
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
_REMOVED = {("checkpoint", "writer"): ("thread", "process")}  # key: its values, all of which computed the same
_HOLD_TARGETS = (("model", "target"), ("data", "target"), ("data", "units"))


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a stored config under today's names. What is not old is left as it is."""
    moved = dict(values)
    for section, key in _HOLD_TARGETS:
        held = moved.get(section)
        if isinstance(held, dict) and isinstance(held.get(key), str):
            moved[section] = held | {key: _TARGETS.get(held[key], held[key])}
    for (section, key), equal in _REMOVED.items():
        held = moved.get(section)
        if isinstance(held, dict) and held.get(key) in equal:
            moved[section] = {name: value for name, value in held.items() if name != key}
    return moved
