"""What became of each step, as a table, as JSON, and as an exit status."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class Status(enum.StrEnum):
    PASSED = "passed"
    FAILED = "failed"  # it said why
    LATE = "late"  # it was killed at its limit
    NOT_REACHED = "not reached"  # the time was over before
    ABSENT = "absent"  # there is nothing to prove yet: the reason says what is missing


@dataclass(frozen=True)
class Result:
    """Of one step."""

    name: str
    status: Status
    seconds: float
    summary: str
    numbers: dict[str, Any] = field(default_factory=dict)


def verdict(results: Sequence[Result]) -> int:
    """The exit status: 0 only if every step passed, apart from those for which there is nothing to prove yet."""
    passed = all(result.status in (Status.PASSED, Status.ABSENT) for result in results)
    return 0 if passed and any(result.status is Status.PASSED for result in results) else 1


def table(results: Sequence[Result], device: str) -> str:
    width = max(len(result.name) for result in results)
    lines = [f"{r.name:<{width}}  {r.status:<11}  {r.seconds:6.1f} s  {r.summary}" for r in results]
    counts = [f"{sum(r.status is status for r in results)} {status}" for status in Status]
    lines.append(", ".join(count for count in counts if not count.startswith("0 ")))
    if device == "cpu":
        lines.append("on a CPU: this proves that the script runs, and nothing of a GPU")
    return "\n".join(lines)


def as_json(results: Sequence[Result], device: str) -> str:
    return json.dumps({"device": device, "steps": [vars(result) for result in results]}, indent=1)
