"""The rows of several sources as one sequence, in the proportions of `data.mixture`."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stoker.data.indexed import IndexPlan
from stoker.data.mixture import Mixture, mix
from stoker.data.packing import Pieces
from stoker.data.rows import shape_of

_HISTORY_BYTES = 16 << 20  # of the history of weights; untouched pages cost nothing
_ROUNDING = 8  # units of weight in 2**30 by which two machines may differ over the same shares


@dataclass(frozen=True)
class Weights:
    """The config's integer weights from a step on, by source; the first from step 1."""

    from_step: int
    weights: tuple[int, ...]


class MixedPlan:
    """Implements `stoker.data.rows.RowPlan` over the plans of several sources.

    Which weights hold from which row follows from the run's state: changed weights hold from the row at which the run
    was resumed. `resume` sets it, also for readers that were forked before: it is in shared memory.
    """

    def __init__(
        self, plans: Sequence[IndexPlan], wanted: Sequence[Weights], batch_rows: int, fingerprint: Mapping[str, Any]
    ) -> None:
        self.plans, self._wanted, self._batch_rows = tuple(plans), tuple(wanted), batch_rows
        self.fingerprint = fingerprint
        self.seq_len, self.document_mask = plans[0].seq_len, plans[0].document_mask
        self.weighted = any(plan.weighted for plan in plans)
        self.documents_together, self.taught = plans[0].documents_together, plans[0].taught
        self._shared = mmap.mmap(-1, _HISTORY_BYTES)
        self._seen = b""
        self._mixture: Mixture | None = None
        self.resume(None, 0, 0)

    @property
    def name(self) -> str:
        return " + ".join(plan.name for plan in self.plans)

    @property
    def rows_per_epoch(self) -> int:
        """Rows after which every source has been read once on average; sources have separate epochs."""
        return sum(plan.rows_per_epoch for plan in self.plans)

    @property
    def total_rows(self) -> int | None:
        return self.mixture.total_rows

    @property
    def mixture(self) -> Mixture:
        """The sequence of sources as known so far."""
        size = int.from_bytes(self._shared[:8], "little")
        seen = self._shared[8 : 8 + size]
        if seen != self._seen or self._mixture is None:
            history = [(row, tuple(weights)) for row, weights in json.loads(seen)]
            self._mixture, self._seen = mix(history, [plan.total_rows for plan in self.plans]), seen
        return self._mixture

    def history(self, row: int) -> list[list[Any]]:
        """The weights of all rows before `row`: `[[first row, [weight of each source]], ...]`."""
        size = int.from_bytes(self._shared[:8], "little")
        return [entry for entry in json.loads(self._shared[8 : 8 + size]) if entry[0] < row]

    def resume(self, history: Sequence[Sequence[Any]] | None, row: int, step: int) -> None:
        """Rows before `row` had the weights of `history`; those of the steps after `step` have the config's."""
        known = weights_from(self._wanted, history, row, step, self._batch_rows)
        text = json.dumps(known).encode()
        if len(text) + 8 > _HISTORY_BYTES:
            raise ValueError(f"the weights of {len(self.plans)} sources changed {len(known)} times: too often to keep")
        self._shared[8 : 8 + len(text)] = text
        self._shared[:8] = len(text).to_bytes(8, "little")

    def counts(self, row: int) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for plan, rows in zip(self.plans, self.mixture.counts(row), strict=True):
            found |= plan.counts(rows)
        return found

    def read(self, numbers: np.ndarray, out: np.ndarray) -> None:
        for number, places, rows in self._by_source(numbers):
            part = np.empty(shape_of(self, len(rows)), np.int32)
            self.plans[number].read(rows, part)
            out[:, places] = part

    def pieces(self, numbers: np.ndarray) -> list[tuple[IndexPlan, np.ndarray, Pieces]]:
        """For each source that has some of the rows `numbers`: its plan, their places in `numbers`, their pieces."""
        return [(self.plans[k], places, self.plans[k].pieces(rows)) for k, places, rows in self._by_source(numbers)]

    def _by_source(self, numbers: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        sources, rows = self.mixture.assign(np.asarray(numbers, np.int64))
        return [(k, np.flatnonzero(sources == k), rows[sources == k]) for k in np.unique(sources).tolist()]


def weights_from(
    wanted: Sequence[Weights], history: Sequence[Sequence[Any]] | None, row: int, step: int, batch_rows: int
) -> list[list[Any]]:
    """`[[first row, [weight of each source]], ...]` when a run resumes at `row`, after `step` steps.

    The rows before had the weights of `history`, in the same form; the steps after `step` have those of `wanted`.
    """
    known: list[Any] = [[int(first), [int(weight) for weight in weights]] for first, weights in history or []]
    due = [phase for phase in wanted if phase.from_step <= step + 1]
    now = list(due[-1].weights)
    if not known or _differ(known[-1][1], now):
        known.append([row, now])
    for phase in wanted:
        if phase.from_step > step + 1:
            known.append([row + (phase.from_step - 1 - step) * batch_rows, list(phase.weights)])
    return known


def _differ(old: Sequence[int], new: Sequence[int]) -> bool:
    return any(abs(a - b) > _ROUNDING for a, b in zip(old, new, strict=True))
