"""Row plans made for a test: rows whose tokens are their own number, and rows that take their time or fail."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class NumberPlan:
    """Every token of row n is n. Row `fails_at` cannot be read."""

    total_rows: int | None = None
    seq_len: int = 4
    rows_per_epoch: int = 10
    seconds: float = 0.0
    fails_at: int | None = None
    document_mask: bool = False
    weighted: bool = False
    taught: int = 0
    documents_together: int = 1
    fingerprint: Mapping[str, Any] = field(default_factory=lambda: {"content": "numbers", "seed": 0})

    def read(self, numbers: np.ndarray, out: np.ndarray) -> None:
        time.sleep(self.seconds)
        if self.fails_at in numbers:
            raise ValueError(f"row {self.fails_at} is unreadable")
        out[:] = numbers[None, :, None]

    def history(self, row: int) -> None:
        return None

    def resume(self, history: None, row: int, step: int) -> None:
        pass

    def counts(self, row: int) -> dict[str, dict[str, int]]:
        return {"numbers": {"rows": row, "epoch": row // self.rows_per_epoch}}
