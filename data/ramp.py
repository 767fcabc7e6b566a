"""A row source whose steps grow: each takes so many batches of another source as `batch.ramp` gives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stoker.conf.ramp import Ramp
from stoker.data.loader import EndOfData, IndexedLoader, RowSource
from stoker.parallel.batch import Batch, joined


class RampedRows:
    """A `RowSource` over `inner`, whose batches have `ramp.unit` rows. The order of the sequences is that of `inner`.

    Finite data must be indexed: only there it is known whether a whole step is left.
    """

    def __init__(self, inner: RowSource, ramp: Ramp, pin: bool = False) -> None:
        self._inner, self._ramp, self._pin = inner, ramp, pin
        self._step = 0  # the last one handed out or passed over
        self._taken = 0  # batches of `inner`

    @property
    def row(self) -> int:
        return self._inner.row

    @property
    def exhausted(self) -> bool:
        if isinstance(self._inner, IndexedLoader):
            return self._inner.batches_left < self._batches(self._step + 1)
        return self._inner.exhausted

    @property
    def document_mask(self) -> bool:
        return self._inner.document_mask

    @property
    def weighted(self) -> bool:
        return self._inner.weighted

    @property
    def documents_together(self) -> int:
        return self._inner.documents_together

    def _batches(self, step: int) -> int:
        return self._ramp.size(step) // self._ramp.unit

    def next(self) -> Batch:
        """This rank's rows of the next step. Raises as `inner` does, and EndOfData if it has fewer than these."""
        if self.exhausted:
            raise EndOfData(f"the data end: after row {self.row} less than step {self._step + 1} is left")
        self._step += 1
        count = self._batches(self._step)
        self._taken += count
        batches = [self._inner.next() for _ in range(count)]
        if count == 1:
            return batches[0]
        whole = joined(batches)
        return whole.pin() if self._pin else whole

    def pass_over(self, step: int) -> None:
        """Leave out the rows of the steps before `step`, or all there are."""
        rows = self._ramp.rows_before(step) - self._ramp.rows_before(self._step + 1)
        self._taken += rows // self._ramp.unit
        self._inner.pass_over(self._taken + 1)
        self._step = step - 1

    def metrics(self) -> dict[str, float]:
        return {**self._inner.metrics(), "batch_size": self._ramp.size(max(1, self._step))}

    def state(self) -> dict[str, Any]:
        return {**self._inner.state(), "step": self._step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError also where a run without this ramp has read rows that are no multiple of its unit."""
        self._taken, rest = divmod(state["row"], self._ramp.unit)
        if rest:
            raise ValueError(
                f"the checkpoint has read {state['row']} sequences, no multiple of the {self._ramp.unit} that the "
                "steps of batch.ramp have in common: sizes whose common divisor divides it work"
            )
        self._inner.load_state({**state, "step": self._taken})
        self._step = state["step"]

    def close(self) -> None:
        self._inner.close()
