"""Credentials in settings. A config is written to config.yaml, checkpoints, logs and trackers, so it holds none.

An address may name a variable of the environment in the place of a credential: `https://host/a.tar?$STOKER_SECRET_SAS`.
The name is what a run keeps and what messages show; the value is put in only when the address is asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

PREFIX = "STOKER_SECRET_"
MASK = "***"

_NAMED = re.compile(r"\$(" + PREFIX + r"[A-Z0-9_]+)")
_WORDS = "token|secret|password|passwd|pwd|sig|signature|credential|api_?key|secret_?key|access_?key|access_?key_?id"
_VALUE = r"(?!\$)[^\s&;'\"]{3,}"
_SECRETS = [  # a group before what is secret, and what is
    re.compile(r"(://[^/\s@:]*:)((?!\$)[^/\s@]+)(?=@)"),
    re.compile(rf"(?i)((?<![a-z0-9])(?:[a-z0-9_-]*[_-])?(?:aws)?(?:{_WORDS})\s*[=:]\s*)({_VALUE})"),
    re.compile(rf"(?i)(\b(?:bearer|basic)\s+)({_VALUE})"),
    re.compile(rf"(\s(?:-u|--user|--proxy-user)[\s=]+['\"]?[^\s:]+:)({_VALUE})"),
]


def mask(text: str) -> str:
    """`text` with *** in the place of credentials."""
    for pattern in _SECRETS:
        text = pattern.sub(rf"\g<1>{MASK}", text)
    return text


def secrets_in(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and masked text of each credential in plain values; `key` is that of `value`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from secrets_in(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from secrets_in(inner, key)
    elif isinstance(value, str):
        named = f"{key.rpartition('.')[2]}={value}"  # args: {api_key: ...}
        if mask(value) != value:
            yield key, mask(value)
        elif mask(named) != named:
            yield key, MASK


def names_a_secret(value: Any) -> bool:
    """Whether an address, or one of many, names a variable whose value would be sent."""
    return f"${PREFIX}" in str(value)


def reveal(address: str) -> str:
    """`address` with the values of the variables that it names. Raises ValueError for one that is not set."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if found is None:
            raise ValueError(f"{address} names ${match[1]}, and this process's environment has no such variable")
        return found

    return _NAMED.sub(value, address)


def conceal(text: str, address: str) -> str:
    """`text`, such as a library's error, with the names again where it holds the values that `reveal` put in."""
    for name in _NAMED.findall(address):
        if found := os.environ.get(name):
            text = text.replace(found, f"${name}")
    return text
