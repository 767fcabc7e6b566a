"""Which streams' source each row comes from, as `data.mixture` has it; one source is a mixture of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stoker.data.mixed import Weights, weights_from
from stoker.data.mixture import Mixture, mix

Limits = tuple[int | None, ...]  # rows of each source in all
NOBODY = -1


class StreamMixture:
    """The source of each row of the global sequence.

    Which weights hold from which row is known only once the run's state is: see `stoker.data.mixed.MixedPlan`. And how
    many rows a source has is known only when its last windows are read; from then on it is told by the `limits` of
    every call (None: not known yet). Rows before a source's last are not moved by its limit.
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
        """Of each of `rows` (int64): the number of its source, NOBODY after the end, and its row of that source."""
        sources, numbers = self._of(limits).assign(rows)
        end = self.total_rows(limits)
        return (sources if end is None else np.where(rows < end, sources, NOBODY)), numbers

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
