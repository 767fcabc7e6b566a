"""Python's garbage collector at fixed steps.

Left alone it stops each rank at another moment, and all wait for the one that is stopped. So it runs on all ranks after
the same steps: the young objects often, all of them now and then.
"""

from __future__ import annotations

import gc

YOUNG_EVERY, ALL_EVERY = 50, 1000  # steps


class Collections:
    """Takes collection over from Python until it is closed."""

    def __init__(self) -> None:
        self._was_on = gc.isenabled()
        gc.disable()

    def after(self, step: int) -> None:
        if step % YOUNG_EVERY == 0:
            gc.collect(2 if step % ALL_EVERY == 0 else 1)

    def close(self) -> None:
        if self._was_on:
            gc.enable()
