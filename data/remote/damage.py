"""Damage: what is wrong with stored data, told with its URL, byte and sample, and what is done about it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)


class Damaged(ValueError):
    """Stored data that cannot be read as what they claim to be. The message names URL, byte and sample."""

    def __init__(self, reason: str, url: str, byte: int | None = None, sample: str | None = None) -> None:
        self.reason, self.url, self.byte, self.sample = reason, url, byte, sample
        place = "" if byte is None else f" at byte {byte}"
        which = "" if sample is None else f", sample {sample}"
        super().__init__(f"{url}{place}{which}: {reason}")

    def __reduce__(self) -> tuple:
        return Damaged, (self.reason, self.url, self.byte, self.sample)


@dataclass(frozen=True)
class Loss:
    """Documents of a split that damage makes unreadable: `count` of them from number `first` on; None: all the rest."""

    damage: Damaged
    first: int
    count: int | None


# Told of each loss while a split is read; returning goes on without what is lost.
Report = Callable[[Loss], None]


def refuse(loss: Loss) -> None:
    """`data.on_damage=error`."""
    raise loss.damage
