"""Python's garbage is collected after the same steps on all ranks, and never in between."""

from __future__ import annotations

import gc
import weakref

import pytest

from stoker.trainer.runtime.garbage import ALL_EVERY, YOUNG_EVERY, Collections


class Node:
    """Refers to itself: only a collection frees it."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def collecting():
    yield
    gc.enable()


def test_cycles_are_freed_after_fixed_steps_and_only_then() -> None:
    collections = Collections()
    seen = weakref.ref(Node())
    for _ in range(20_000):  # as many objects make Python collect by itself
        Node()
    collections.after(YOUNG_EVERY - 1)
    assert seen() is not None
    collections.after(YOUNG_EVERY)
    assert seen() is None
    assert ALL_EVERY % YOUNG_EVERY == 0


@pytest.mark.parametrize("on", [True, False])
def test_what_was_switched_on_before_is_again(on: bool) -> None:
    gc.enable() if on else gc.disable()
    Collections().close()
    assert gc.isenabled() is on
