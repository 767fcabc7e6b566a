"""Small JSON files that commands read back, whatever they hold: of the declared types, or a ValueError of one line."""

from __future__ import annotations

import json
import math
import typing
from pathlib import Path
from typing import Any, TypeVar

from stoker.conf.values import expected, fits

T = TypeVar("T")

MOST_BYTES = 16 << 20  # of a record


def parse_json(data: bytes | str) -> Any:
    """The value in `data`. Raises ValueError for what is no JSON, also where it is nested too deeply to be read."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """The value in a file. Raises ValueError without its name, and OSError."""
    with open(path, "rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it holds more than {most_bytes:,} bytes")
    return parse_json(data)


def read_record(path: Path, kind: type[T], what: str) -> T:
    """The dataclass `kind` from the file `path`, which is to be `what`.

    Raises ValueError naming the file for anything else, and FileNotFoundError.
    """
    try:
        return record_of(read_json(path), kind)
    except ValueError as error:
        raise ValueError(f"{path} is not {what}: {error}") from error


def record_of(values: Any, kind: type[T]) -> T:
    """The dataclass `kind` from JSON values. Raises ValueError naming a key that is missing, unknown or of another
    type, and for numbers that are not finite."""
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}, not an object")
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"it has no key {str(key)[:80]!r}")
        if not fits(value, hints[key]) or not is_sane(value):
            raise ValueError(f"its {key} is {str(value)[:80]}, not {expected(hints[key])}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(str(error).rpartition("() ")[2]) from error


def is_sane(value: Any) -> bool:
    """Whether all numbers in JSON values are finite and of 64 bits, as those are that Stoker writes."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return abs(value) < 1 << 64
    if isinstance(value, dict):
        return all(map(is_sane, value.values()))
    return all(map(is_sane, value)) if isinstance(value, list) else True
