from __future__ import annotations

from collections.abc import Iterator

import pytest

from stoker.checkpoint import plan, writer
from tests.checkpoint.simulated import STARTED


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 1 KiB, and replicas share shards of few elements: what is for large tensors happens to small ones."""
    monkeypatch.setattr(writer, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(plan, "SPLIT_ELEMENTS", 16)


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test() -> Iterator[None]:
    yield
    while STARTED:
        STARTED.pop().abandon()
