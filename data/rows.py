"""The row interface of both modes, and rows as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from stoker.parallel.batch import Batch

# Between processes rows are one int32 array [planes, rows, seq_len]. WEIGHTS, the bits of float32 numbers, is there for
# weighted rows only. After it come `RowPlan.taught` planes of a teacher's predictions (`stoker.data.taught`).
TOKENS, LABELS, POSITIONS, DOCUMENTS, WEIGHTS = range(5)


class RowPlan(Protocol):
    """The global sequence of rows, as a function of the row number alone. Plain arrays and files: it can be forked."""

    @property
    def seq_len(self) -> int: ...

    @property
    def document_mask(self) -> bool:
        """Whether attention is to be kept inside the documents of a row."""
        ...

    @property
    def weighted(self) -> bool:
        """Whether rows have the plane WEIGHTS."""
        ...

    @property
    def taught(self) -> int:
        """How many planes of a teacher's predictions rows have."""
        ...

    @property
    def documents_together(self) -> int:
        """How many documents in turn belong together, and are whole in one row."""
        ...

    @property
    def rows_per_epoch(self) -> int: ...

    @property
    def total_rows(self) -> int | None:
        """How many rows there are; None when the data never end."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """Everything that the rows depend on, as JSON values by name."""
        ...

    def read(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Write the rows `numbers` (int64 `[rows]`, each in `range(total_rows)`) to `out`, int32 of `shape_of`.

        The planes are TOKENS, LABELS (IGNORE_INDEX where no label is trained), POSITIONS and DOCUMENTS; and WEIGHTS of
        the labels if the plan is `weighted`; then those of a teacher.
        """
        ...

    def counts(self, row: int) -> dict[str, dict[str, int]]:
        """How far each source is read after the rows before `row`: `{name: {"rows": rows, "epoch": epoch}}`, and
        where it is known the number of documents that are in no row, `"leftovers"`."""
        ...

    def history(self, row: int) -> Any:
        """Settings of the rows before `row` beside the fingerprint, as JSON; None without any."""
        ...

    def resume(self, history: Any, row: int, step: int) -> None:
        """Resume at `row`, after `step` steps, with `history` for the rows before. Applies to forked readers too."""
        ...


def read_rows(plan: RowPlan, numbers: Sequence[int], pin: bool = False) -> Batch:
    """The rows `numbers` of `plan`, read in this process; in page-locked memory if `pin`."""
    packed = np.empty(shape_of(plan, len(numbers)), np.int32)
    plan.read(np.asarray(numbers, np.int64), packed)
    return unpack(packed, pin, plan.taught)


def shape_of(plan: RowPlan, rows: int) -> tuple[int, int, int]:
    """The shape of so many rows of `plan` between processes."""
    return WEIGHTS + plan.weighted + plan.taught, rows, plan.seq_len


def unpack(packed: np.ndarray, pin: bool = False, taught: int = 0) -> Batch:
    """A copy of `packed` (int32 `[planes, rows, seq_len]`) as tensors; in page-locked memory if `pin`.

    `taught` of its planes are a teacher's.
    """
    planes = torch.from_numpy(packed)

    def plane(number: int, dtype: torch.dtype) -> torch.Tensor:
        found = planes[number] if dtype != torch.float32 else planes[number].view(dtype)
        return torch.empty(planes.shape[1:], dtype=dtype, pin_memory=pin).copy_(found)

    def last(numbers: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some planes as `[rows, seq_len, planes]`."""
        found = planes[numbers].view(dtype).movedim(0, -1)
        return torch.empty(found.shape, dtype=dtype, pin_memory=pin).copy_(found)

    own, k = len(planes) - taught, taught // 2
    return Batch(
        tokens=plane(TOKENS, torch.int64),
        labels=plane(LABELS, torch.int64),
        positions=plane(POSITIONS, torch.int64),
        documents=plane(DOCUMENTS, torch.int32),
        weights=plane(WEIGHTS, torch.float32) if own > WEIGHTS else None,
        reference=plane(own, torch.float32) if taught == 1 else None,
        teacher_tokens=last(slice(own, own + k), torch.int32) if k else None,
        teacher_log_probabilities=last(slice(own + k, None), torch.float32) if k else None,
    )
