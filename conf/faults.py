"""Failures that can be injected: the entries of `faults`, such as `faults=[{at: 7, rank: 1, do: kill}]`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KINDS = {
    "kill": "the rank kills itself (SIGKILL) before its passes",
    "hang": "the rank sleeps for ever before its passes",
    "slow": "the rank computes for nothing, `seconds` in each of `steps` steps",
    "nan": "the first output of a module in the rank's passes is nan, in each of `steps` steps",
    "oom": "the rank requests more memory than its device has",
    "disk_full": "the rank's part of the next checkpoint, of this step or later, meets a full disk",
    "net_loss": "every network connection of the rank is cut",
}
LASTING = {"slow": 30, "nan": 1}  # those that last for `steps` steps, with their defaults


@dataclass(frozen=True)
class Fault:
    """One entry. It is injected once in a run, also over restarts."""

    at: int  # step, counted from 1
    do: str  # one of KINDS
    rank: int = 0  # global
    steps: int = 1  # that it lasts
    seconds: float = 1.0  # slow: in each step

    @property
    def name(self) -> str:
        """Identifies it among the faults of a run."""
        return f"step-{self.at}-rank-{self.rank}-{self.do}"


def spelled(entry: dict[str, Any]) -> dict[str, Any]:
    """`entry` with `do: nan` as text: YAML reads a number, which is not even equal to itself."""
    kind = entry.get("do")
    return entry | {"do": "nan"} if isinstance(kind, float) and kind != kind else entry


def read_faults(entries: Sequence[dict[str, Any]]) -> list[Fault]:
    """The entries of `faults`. Raises ValueError, of one line, for the first invalid one."""
    found: list[Fault] = []
    for entry in entries:
        fault = _read(entry)
        if any(other.name == fault.name for other in found):
            raise ValueError(f"{_text(entry)}: this fault is listed twice, and each is injected once")
        found.append(fault)
    return found


def _read(entry: dict[str, Any]) -> Fault:
    kind = entry.get("do")
    if kind not in KINDS:
        known = sorted(KINDS, key=lambda name: -difflib.SequenceMatcher(None, str(kind), name).ratio())
        raise ValueError(f"{_text(entry)}: do must be one of {', '.join(known)}")
    fields: dict[str, tuple[type, float]] = {"at": (int, 1), "rank": (int, 0)}  # type and least value
    if kind in LASTING:
        fields["steps"] = (int, 1)
    if kind == "slow":
        fields["seconds"] = (float, 0)
    values = {key: value for key, value in entry.items() if key != "do"}
    if "at" not in values:
        raise ValueError(f"{_text(entry)}: at=STEP is missing")
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"{_text(entry)}: do: {kind} has no {key}; it has {', '.join(fields)}")
        of_type, least = fields[key]
        if type(value) not in (int, of_type) or not least <= value < float("inf"):
            number = "a whole number" if of_type is int else "a number"
            raise ValueError(f"{_text(entry)}: {key} must be {number} from {least} on")
    return Fault(do=kind, **({"steps": LASTING.get(kind, 1)} | values))


def _text(entry: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in entry.items()) + "}"
