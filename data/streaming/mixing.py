"""The source of each row of the streams, by `data.mixture`; a single source is a mixture of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stoker.data.mixed import Weights, weights_from
from stoker.data.mixture import Mixture, mix

Limits = tuple[int | None, ...]  # rows of each source in all
NO_SOURCE = -1


class StreamMixture:
    """The source of each row of the global sequence.

    Which weights hold from which row follows from the run's state: see `stoker.data.mixed.MixedPlan`. The number of
    rows of a source is known only when its last windows are read; from then on it is in the `limits` of every call
    (None: not known yet). A source's limit does not move the rows before its last.
    """

    def __init__(self, wanted: Sequence[Weights], batch_rows: int) -> None:
        self._wanted, self._batch_rows = wanted, batch_rows
        self.resume(None, 0, 0)

    def resume(self, history: Sequence[Sequence[Any]] | None, row: int, step: int) -> None:
        """Rows before `row` had the weights of `history`; those of the steps after `step` have the config's."""
        self._known = weights_from(self._wanted, history, row, step, self._batch_rows)
        self._mixtures: dict[Limits, Mixture] = {}

    def history(self, row: int) -> list[list[Any]]:
        """The weights of all rows before `row`: `[[first row, [weight of each source]], ...]`."""
        return [entry for entry in self._known if entry[0] < row]

    def changes_at(self, row: int) -> bool:
        """Whether other weights hold from `row` on than before it."""
        return row > 0 and any(first == row for first, _ in self._known)

    def assign(self, rows: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
        """For each of `rows` (int64): the number of its source, NO_SOURCE after the end, and its row of that source."""
        sources, numbers = self._of(limits).assign(rows)
        end = self.total_rows(limits)
        return (sources if end is None else np.where(rows < end, sources, NO_SOURCE)), numbers

    def total_rows(self, limits: Limits) -> int | None:
        """How many rows there are when every source with a weight has ended; None: without end, or not known yet."""
        return self._of(limits).total_rows

    def _of(self, limits: Limits) -> Mixture:
        if limits not in self._mixtures:
            weights = [(first, tuple(weights)) for first, weights in self._known]
            self._mixtures[limits] = mix(weights, limits)
        return self._mixtures[limits]


def one_source() -> StreamMixture:
    """Every row is of source 0."""
    return StreamMixture([Weights(1, (1,))], 1)
