"""How much the tests try: with `STOKER_TESTS=full` whole products of cases and every test marked `full`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

FULL = os.environ.get("STOKER_TESTS") == "full"


def some(cases: Sequence[T], every: int) -> list[T]:
    """The first of every `every` cases; `FULL`: all."""
    return list(cases[:: 1 if FULL else every])
