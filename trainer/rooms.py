"""Whether the rooms that would be imported are Stoker's own: a folder `data/` in the working directory is common."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOMS = ("launch", "trainer", "checkpoint", "models", "data", "parallel", "conf")


def shadowed_rooms() -> list[str]:
    """One line for each room that another package or folder stands in the place of."""
    home = Path(__file__).resolve().parent.parent
    lines = []
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != home / room:
            other = found or (next(iter(spec.submodule_search_locations or ()), "nothing") if spec else "nothing")
            lines.append(
                f"the package {room!r} is {other}, not Stoker's own: start from another directory, "
                "or set PYTHONSAFEPATH=1"
            )
    return lines
