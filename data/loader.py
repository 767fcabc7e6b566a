"""The stream of rows that one rank trains on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from stoker.data.keys import compare as compare_fingerprints
from stoker.data.keys import described
from stoker.data.readers import Readers
from stoker.data.rows import RowPlan, shape_of, unpack
from stoker.parallel.batch import Batch

log = logging.getLogger(__name__)

COMPARED_EVERY = 64  # batches between two comparisons over a model-parallel group


class EndOfData(Exception):
    """There is no further global batch. Every rank raises it at the same step."""


class RowSource(Protocol):
    """The loop's interface to its data, in both modes."""

    @property
    def row(self) -> int:
        """Global number of the next row; all rows before it have been returned or skipped."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether `next` would raise EndOfData. Equal on all ranks."""
        ...

    @property
    def document_mask(self) -> bool:
        """Whether attention is to be kept inside the documents of a row."""
        ...

    @property
    def weighted(self) -> bool:
        """Whether labels have weights."""
        ...

    @property
    def documents_together(self) -> int:
        """How many documents in turn belong together, and are whole in one row."""
        ...

    def pass_over(self, step: int) -> None:
        """Leave out the global batches before that of `step`, which count from 1, or all there are."""
        ...

    def next(self) -> Batch:
        """This rank's rows of the next global batch, `[batch_rows / dp, seq_len]`. Raises EndOfData after the last."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers of the data for metrics.jsonl, up to the rows returned."""
        ...

    def state(self) -> dict[str, Any]:
        """The state of the stream after the rows returned: JSON values, equal on every rank of every layout."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue after the rows that `state` has read. Raises ValueError, with what differs, for other rows."""
        ...

    def close(self) -> None:
        """End what was started to read ahead."""
        ...


class IndexedLoader:
    """This rank's rows of each global batch, from a row number on.

    Of the global batch that begins at row n, data-parallel rank r reads rows n + r, n + r + dp, n + r + 2 dp, ...;
    the last rows of finite data, if they do not fill a global batch, are left out. Reader processes are forked here:
    make the stream before the model, so that they do not keep a second copy of it in memory.
    """

    def __init__(
        self,
        plan: RowPlan,
        batch_rows: int,
        dp_rank: int = 0,
        dp: int = 1,
        *,
        row: int = 0,
        workers: int = 0,
        prefetch: int = 4,
        pin: bool = False,
        compare: Callable[[np.ndarray], None] | None = None,
        change: bool = False,
    ) -> None:
        """`row`: global number of the first row; `prefetch`: global batches that each of `workers` reads ahead.

        `pin` puts the rows into page-locked memory. `compare` is called with this rank's rows now and then, and raises
        when the ranks that should hold the same rows do not. `change` (run.change) allows a state of an earlier version
        that lacks an ingredient of its fingerprint. Raises ValueError when `batch_rows` does not divide over `dp`.
        """
        if batch_rows % dp:
            raise ValueError(f"batch.size={batch_rows} does not divide over {dp} data-parallel ranks")
        self._plan, self._batch_rows, self._pin, self._compare = plan, batch_rows, pin, compare
        self._change = change
        self._handed_out = 0  # batches since this start
        self._mine = np.arange(dp_rank, batch_rows, dp)  # places of this rank's rows in a global batch
        self._row = self._ask_from = row
        self._step = row // batch_rows
        shape = shape_of(plan, len(self._mine))
        self._packed = np.empty(shape, np.int32)
        self._readers = Readers(self._read, shape, workers, prefetch) if workers else None
        self._ask()
        left_out = self._rows_left % batch_rows if plan.total_rows is not None else 0
        if left_out:
            log.info("the data end with %d rows that fill no global batch of %d: left out", left_out, batch_rows)

    @property
    def row(self) -> int:
        """Global number of the next row; all rows before it have been handed out."""
        return self._row

    @property
    def document_mask(self) -> bool:
        """Whether attention is to be kept inside the documents of a row."""
        return self._plan.document_mask

    @property
    def weighted(self) -> bool:
        return self._plan.weighted

    @property
    def documents_together(self) -> int:
        return self._plan.documents_together

    @property
    def batches_left(self) -> int:
        """How many times `next` can be called; `sys.maxsize` when the data never end. Equal on all ranks."""
        return self._rows_left // self._batch_rows

    @property
    def exhausted(self) -> bool:
        """Whether `next` would raise EndOfData. Equal on all ranks."""
        return not self.batches_left

    def metrics(self) -> dict[str, float]:
        """Numbers of the data for metrics.jsonl, up to the rows returned."""
        return {
            f"data.{source}.{name}": count
            for source, counts in self._plan.counts(self._row).items()
            for name, count in counts.items()
        }

    def next(self) -> Batch:
        """This rank's rows of the next global batch, `[batch_rows / dp, seq_len]`.

        Raises EndOfData after the last batch, and RuntimeError when a reader process was killed or failed, or when the
        ranks of a model-parallel group hold different rows.
        """
        if not self.batches_left:
            raise EndOfData(
                f"the data end after {self._plan.total_rows} rows, "
                f"and {self._rows_left} are left at row {self._row}: too few for batch.size={self._batch_rows}"
            )
        packed = self._packed
        if self._readers is None:
            self._read(self._row, packed)
        else:
            packed = self._readers.take()
        if self._compare is not None and self._handed_out % COMPARED_EVERY == 0:
            self._compare(packed)
        self._handed_out += 1
        rows = unpack(packed, self._pin, self._plan.taught)
        self._row += self._batch_rows
        self._step += 1
        self._ask()
        return rows

    def pass_over(self, step: int) -> None:
        """Leave out the global batches before that of `step`, which count from 1, or all there are."""
        batches = step - 1 - self._step
        assert batches >= 0, "steps only increase"
        batches = min(batches, self.batches_left)
        row = self._row + batches * self._batch_rows
        while self._readers is not None and self._row < min(row, self._ask_from):
            self._readers.take()  # read ahead and not needed
            self._row += self._batch_rows
        self._row, self._ask_from = row, max(row, self._ask_from)
        self._step += batches
        self._ask()

    def state(self) -> dict[str, Any]:
        """The state of the stream after the rows returned: JSON values, equal on every rank of every layout."""
        return {
            "row": self._row,
            "step": self._step,
            "fingerprint": dict(self._plan.fingerprint),
            "sources": self._plan.counts(self._row),
            "weights": self._plan.history(self._row),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue after the rows that `state` has read. Raises ValueError, with what differs, for other rows."""
        refuse_other_data(self._plan.fingerprint, state, self._change)
        self._plan.resume(state["weights"], state["row"], state["step"])
        self._refuse_other_counts(state)
        if self._readers is not None:
            self._readers.discard()
        self._row = self._ask_from = state["row"]
        self._step = state["step"]
        self._ask()

    def close(self) -> None:
        """End the reader processes at once."""
        if self._readers is not None:
            self._readers.close()

    def _refuse_other_counts(self, state: Mapping[str, Any]) -> None:
        """A mixture counts on from the rows that each source has given: they follow from the weights and the epochs."""
        for name, counts in self._plan.counts(state["row"]).items():
            given = state["sources"].get(name, counts)["rows"]  # a single source may have another name now
            if given != counts["rows"]:
                raise ValueError(
                    f"the first {state['row']} rows hold {given} of {name}, and with the present epochs of the sources "
                    f"they would hold {counts['rows']}: a source that has ended cannot continue in a mixture, so set "
                    "data.epochs and max_epochs back to their former values"
                )

    @property
    def _rows_left(self) -> int:
        total = self._plan.total_rows
        return sys.maxsize if total is None else max(0, total - self._row)

    def _read(self, row: int, out: np.ndarray) -> None:
        self._plan.read(row + self._mine, out)

    def _ask(self) -> None:
        """Keep the readers busy up to the last whole batch."""
        last = self._row + self.batches_left * self._batch_rows
        while self._readers is not None and self._readers.free and self._ask_from < last:
            self._readers.ask(self._ask_from)
            self._ask_from += self._batch_rows


def refuse_other_data(fingerprint: Mapping[str, Any], state: Mapping[str, Any], change: bool = False) -> None:
    """Raises ValueError, with what differs, when `state` is of data with another fingerprint.

    `change` allows ingredients that a state of an earlier version does not record (`stoker.data.keys.compare`).
    """
    ours, theirs = dict(fingerprint), dict(state["fingerprint"])
    found = compare_fingerprints(ours, theirs)
    if found.different:
        differences = ", ".join(
            f"{described(name)} was {theirs.get(name)} and is {ours.get(name)}" for name in found.different
        )
        raise ValueError(f"the checkpoint has read {state['row']} rows of other data: {differences}")
    if not found.unrecorded:
        return
    names = ", ".join(f"{described(name)}, now {ours[name]}" for name in found.unrecorded)
    unknown = f"an earlier version of Stoker stored this checkpoint and did not record {names}"
    if not change:
        raise ValueError(f"{unknown}: if that has not changed, set run.change=true to continue")
    log.warning("%s: continuing because of run.change=true", unknown)
