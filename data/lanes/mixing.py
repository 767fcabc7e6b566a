"""Which lanes' source each row comes from, as `data.mixture` has it; one source is a mixture of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.mixed import Weights, weights_from
from data.mixture import Mixture, mix


class LaneMixture:
    """The source of each row of the global sequence. The sources have no end.

    Which weights hold from which row is known only once the run's state is: see `data.mixed.MixedPlan`.
    """

    def __init__(self, sources: int, wanted: Sequence[Weights], batch_rows: int) -> None:
        self._sources, self._wanted, self._batch_rows = sources, wanted, batch_rows
        self.resume(None, 0, 0)

    def resume(self, history: Sequence[Sequence[Any]] | None, row: int, step: int) -> None:
        """Rows before `row` had the weights of `history`; those of the steps after `step` have the config's."""
        self._known = weights_from(self._wanted, history, row, step, self._batch_rows)
        self._mixture: Mixture = mix(
            [(first, tuple(weights)) for first, weights in self._known], [None] * self._sources
        )

    def history(self, row: int) -> list[list[Any]]:
        """The weights of all rows before `row`: `[[first row, [weight of each source]], ...]`."""
        return [entry for entry in self._known if entry[0] < row]

    def changes_at(self, row: int) -> bool:
        """Whether other weights hold from `row` on than before it."""
        return row > 0 and any(first == row for first, _ in self._known)

    def assign(self, rows: np.ndarray) -> np.ndarray:
        """The number of the source of each of `rows` (int64), alike."""
        return self._mixture.assign(rows)[0]


def one_source() -> LaneMixture:
    """Every row is of source 0."""
    return LaneMixture(1, [Weights(1, (1,))], 1)
