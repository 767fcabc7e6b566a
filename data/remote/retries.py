"""Retries for servers and networks."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How often and how long to try."""

    retries: int = 5  # attempts after the first, without a single byte in between
    first_seconds: float = 0.5  # wait before the first of them; doubles with each
    most_seconds: float = 30.0  # longest wait
    stall_seconds: float = 60.0  # without a byte, after which a connection counts as broken

    def waits(self) -> Iterator[float]:
        """Seconds to wait before each retry: exponential, with full jitter, so that ranks do not retry together."""
        for attempt in range(self.retries):
            yield random.uniform(0.5, 1.0) * min(self.most_seconds, self.first_seconds * 2**attempt)


PATIENCE = Patience()


class Transient(Exception):
    """A failure that may not repeat at the next attempt."""


class Refused(Exception):
    """A permanent failure: the file does not exist, may not be read, or has changed."""


def persist(
    patience: Patience, read: Callable[[int], Iterator[bytes]], retried: Callable[[], None], what: str
) -> bytes:
    """All bytes of `read(n)`, which yields those from byte n on; resumed where it fails with Transient.

    A byte received resets the count of attempts. Raises Transient when none is left.
    """
    pieces: list[bytes] = []
    held = 0
    waits = patience.waits()
    while True:
        try:
            for piece in read(held):
                if piece:
                    pieces.append(piece)
                    held += len(piece)
                    waits = patience.waits()
            return b"".join(pieces)
        except Transient as error:
            wait = next(waits, None)
            if wait is None:
                raise
            log.info("%s: %s after %d bytes: trying again in %.1f s", what, error, held, wait)
            retried()
            time.sleep(wait)
