"""Damage in stored data, reported with its URL, byte and sample, and the handling of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)


class Damaged(ValueError):
    """Stored data that cannot be read in their format. The message names URL, byte and sample."""

    def __init__(self, reason: str, url: str, byte: int | None = None, sample: str | None = None) -> None:
        self.reason, self.url, self.byte, self.sample = reason, url, byte, sample
        place = "" if byte is None else f" at byte {byte}"
        which = "" if sample is None else f", sample {sample}"
        super().__init__(printable(f"{url}{place}{which}: {reason}"))

    def __reduce__(self) -> tuple:
        return Damaged, (self.reason, self.url, self.byte, self.sample)


@dataclass(frozen=True)
class Loss:
    """Documents of a split that damage makes unreadable: `count` of them from number `first` on; None: all the rest."""

    damage: Damaged
    first: int
    count: int | None


@dataclass(frozen=True)
class Leftover:
    """A part of a shard between documents that is none, and is left out: not damage, but counted."""

    url: str
    byte: int
    name: str
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.url} at byte {self.byte}, {self.name}: {self.reason}")


# Called with each loss and each leftover while a split is read; if it returns, reading continues without that part.
Report = Callable[[Loss | Leftover], None]


def refuse(found: Loss | Leftover) -> None:
    """`data.on_damage=error`."""
    if isinstance(found, Loss):
        raise found.damage


def printable(text: str) -> str:
    """`text` with control characters and bytes that are not UTF-8 escaped: names come from untrusted files."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
