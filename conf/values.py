"""What a value must be to fit the type that the schema declares for its key."""

from __future__ import annotations

import types
import typing
from typing import Any

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
    dict[str, Any]: "a dictionary such as {key:value}",
    list[float]: "a list of numbers such as [0.9,0.95]",
    list[int]: "a list of whole numbers such as [10,13]",
    list[list[int]]: "a list of spans such as [[10,13]]",
    list[dict[str, Any]]: "a list of dictionaries such as [{key:value}]",
}


class ConfigError(ValueError):
    """A config that cannot run. The message is for the user, one line for each error."""


def options(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type that `hint` is."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def fits(value: Any, hint: Any) -> bool:
    """Whether the plain value `value` fits the declared type `hint`. No conversions but int to float."""
    return any(_fits_one(value, option) for option in options(hint))


def _fits_one(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind is float:
        return type(value) in (int, float)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return type(value) is kind


def expected(hint: Any) -> str:
    """The type in words: `a whole number or null`."""
    return " or ".join(_WORDS.get(option, str(option)) for option in options(hint))
