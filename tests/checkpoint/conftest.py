from __future__ import annotations

import pytest

from stoker.checkpoint import plan, writer


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 1 KiB, and replicas share shards of few elements: what is for large tensors happens to small ones."""
    monkeypatch.setattr(writer, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(plan, "SPLIT_ELEMENTS", 16)
