"""The stream of rows of one rank under data.mode=streaming."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stoker.data.keys import StreamedFingerprint
from stoker.data.loader import COMPARED_EVERY, EndOfData, refuse_other_data
from stoker.data.remote.store import Store
from stoker.data.rows import unpack
from stoker.data.streaming.assignment import from_json, to_json
from stoker.data.streaming.exchange import Alone, Exchange
from stoker.data.streaming.mixing import StreamMixture, one_source
from stoker.data.streaming.packed import planes
from stoker.data.streaming.readers import Key, WindowReaders
from stoker.data.streaming.shuffle_windows import ShuffleWindows
from stoker.data.streaming.stream_rows import Place, Shape, StreamRows
from stoker.parallel.batch import Batch
from stoker.parallel.devices import use_device

log = logging.getLogger(__name__)

FORMAT = 2  # of the state
_LEAVE_SECONDS = 10.0  # waiting for the loader when the stream is closed


class StreamingLoader:
    """This rank's rows of each global batch: of row n, if n mod dp is its data-parallel rank.

    A thread makes the batches ahead: it assigns, reads, and broadcasts rows to the ranks that do not read, over
    separate groups. It runs exactly `prefetch` batches ahead of those returned, on every rank, so that when all ranks
    leave after the same batch none waits for another.

    Reader processes are forked here: make the stream before the model and in the main thread.
    """

    def __init__(
        self,
        sources: Sequence[ShuffleWindows],
        shape: Shape,
        batch_rows: int,
        dp_rank: int = 0,
        dp: int = 1,
        *,
        document_mask: bool = False,
        mixture: StreamMixture | None = None,
        exchange: Exchange | None = None,
        store: Store | None = None,
        workers: int = 0,
        prefetch: int = 4,
        pin: torch.device | None = None,
        skip_limit: int = 10_000,
        change: bool = False,
    ) -> None:
        """`pin`: the GPU for which the rows go into page-locked memory. `skip_limit`: skips of a source that may be
        recorded; `change` as in `IndexedLoader`.

        Raises ValueError unless dp divides the streams and the streams divide `batch_rows`.
        """
        if batch_rows % shape.streams:
            raise ValueError(f"batch.size={batch_rows} is no multiple of data.streams={shape.streams}")
        self._sources, self._shape, self._batch_rows = sources, shape, batch_rows
        self.document_mask = document_mask
        self.weighted, self.documents_together = False, 1  # it reads no conversations
        self._pin, self._prefetch, self._change = pin, prefetch, change
        self._exchange = exchange or Alone()
        self.fingerprint = StreamedFingerprint(
            format=FORMAT,
            streams=shape.streams,
            assign_every=shape.period,
            packing=shape.packing.name,
            document_mask=document_mask,
            seq_len=shape.packing.seq_len,
            sources=tuple((source.name, source.key) for source in sources),
        ).values()
        store = store or Store()
        self._mixture = mixture or one_source()

        def read(key: Key, known: Any) -> Any:
            return sources[key[0]].read(key[1], store, known)

        self._readers = WindowReaders(read, workers) if self._exchange.reads else None
        self._rows = StreamRows(sources, shape, self._mixture, dp_rank, dp, self._readers, self._exchange, skip_limit)
        self._laid = np.empty((2, batch_rows // dp, shape.packing.seq_len + 1), np.int32)
        self._place = self._rows.start()
        self._step = 0  # global batches returned or skipped
        self._ready: deque[tuple[Batch, Place] | BaseException | None] = deque()  # None: the end
        self._wanted = 0  # batches that the loader may make
        self._leaving = False
        self._changed = threading.Condition()
        self._loader: threading.Thread | None = None

    @property
    def row(self) -> int:
        """Global number of the next row; all rows before it have been handed out."""
        return self._place.rows * self._shape.streams

    @property
    def exhausted(self) -> bool:
        """Whether `next` would raise EndOfData. Equal on all ranks."""
        return self._peek() is None

    def pass_over(self, step: int) -> None:
        """Leave out the global batches before that of `step`, which count from 1, or all there are.

        They are read, because only reading gives the state of the streams after them.
        """
        assert step > self._step, "steps only increase"
        while self._step < step - 1 and not self.exhausted:
            self.next()

    def next(self) -> Batch:
        """This rank's rows of the next global batch, `[batch_rows / dp, seq_len]`.

        Raises EndOfData after the last batch, Damaged for damaged data, ValueError for data that changed, and
        RuntimeError when a reader process was killed or failed.
        """
        found = self._peek()
        if found is None:
            raise EndOfData(f"the data end after {self.row} rows")
        rows, self._place = found
        self._step += 1
        with self._changed:
            self._ready.popleft()
            self._wanted += 1
            self._changed.notify_all()
        return rows

    def sources_of_batch(self) -> list[str]:
        """The name of the source of each row of the next global batch; it is read for that, and must exist."""
        found = self._peek()
        assert found is not None
        rows = self.row + np.arange(self._batch_rows)
        sources, _ = self._mixture.assign(rows, found[1].limits)
        return [self._sources[number].name if number >= 0 else "padding" for number in sources.tolist()]

    def state(self) -> dict[str, Any]:
        """The state of the stream after the rows returned: JSON values, equal on every rank of every layout."""
        place = self._place
        sources = {
            source.name: {**to_json(assign), "rows": _short(done)}
            for source, assign, done in zip(self._sources, place.assignments, place.done, strict=True)
        }
        return {
            "row": self.row,
            "step": self._step,
            "fingerprint": self.fingerprint,
            "sources": sources,
            "weights": self._mixture.history(self.row),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue after the rows that `state` has read. Raises ValueError, with what differs, for other rows."""
        refuse_other_data(self.fingerprint, state, self._change)
        self._stop()
        self._rows.forget()
        streams = self._shape.streams
        states = [state["sources"][source.name] for source in self._sources]
        assignments = tuple(from_json(values) for values in states)
        for source, assign in zip(self._sources, assignments, strict=True):
            if assign.tail is not None and (source.total is None or source.total > assign.next_window):
                raise ValueError(
                    f"{source.name} has reached the end of its data, which were divided among the streams after "
                    f"{assign.next_window / source.per_epoch:g} epochs: no more can follow, so set data.epochs back"
                )
        self._step = state["step"]
        self._mixture.resume(state["weights"], state["row"], self._step)
        self._place = Place(
            state["row"] // streams,
            assignments,
            tuple(np.broadcast_to(np.array(values["rows"], np.int64), streams) for values in states),
        )

    def metrics(self) -> dict[str, float]:
        """Counts of assigned, read and skipped data up to the rows returned, over all ranks, for metrics.jsonl."""
        values: dict[str, float] = {
            "data.bytes": self._rows.counters.bytes,
            "data.retries": self._rows.counters.retries,
        }
        for source, assign in zip(self._sources, self._place.assignments, strict=True):
            found = {
                "documents": assign.counted.documents,
                "tokens": assign.counted.tokens,
                "epoch": assign.next_window / source.per_epoch,
                "skips": len(assign.counted.skips),
                "leftovers": assign.counted.leftovers,
            }
            values |= {f"data.{source.name}.{name}": value for name, value in found.items()}
        return values

    def close(self) -> None:
        """End the loader, once all ranks have their requested batches, and the reader processes at once."""
        self._stop()
        if self._readers is not None:
            self._readers.close()

    def _peek(self) -> tuple[Batch, Place] | None:
        if self._loader is None:
            self._wanted, self._leaving = self._prefetch, False
            self._loader = threading.Thread(target=self._load, args=(self._place,), name="streaming", daemon=True)
            self._loader.start()
        with self._changed:
            self._changed.wait_for(lambda: bool(self._ready))
            found = self._ready[0]
        if isinstance(found, BaseException):
            raise found
        return found

    def _load(self, place: Place) -> None:
        """The loader's thread: makes one batch after the other, as many as are requested."""
        made = 0
        if self._pin is not None:
            use_device(self._pin)
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda made=made: made < self._wanted or self._leaving)  # type: ignore[misc]
                    if made >= self._wanted:
                        return
                following = self._rows.read(place, self._batch_rows // self._shape.streams, self._laid)
                if following is None:
                    self._put(None)
                    return
                self._exchange.share(self._laid)
                if made % COMPARED_EVERY == 0:
                    self._exchange.compare(self._laid)
                place, made = following, made + 1
                self._put((unpack(planes(self._laid, self.document_mask), self._pin is not None), place))
        except BaseException as error:  # raised in the thread that requests rows
            self._put(error)

    def _put(self, found: tuple[Batch, Place] | BaseException | None) -> None:
        with self._changed:
            self._ready.append(found)
            self._changed.notify_all()

    def _stop(self) -> None:
        """Let the loader finish its requested batches before it leaves: other ranks may wait for them."""
        if self._loader is None:
            return
        with self._changed:
            self._leaving = True
            self._changed.notify_all()
        self._loader.join(_LEAVE_SECONDS)
        if self._loader.is_alive():
            log.warning("the loader of rows did not end within %.0f s: another rank is gone", _LEAVE_SECONDS)
        self._loader = None
        self._ready.clear()


def _short(rows: np.ndarray) -> int | list[int]:
    """Rows of each stream, as one number where all are equal."""
    return int(rows[0]) if (rows == rows[0]).all() else rows.tolist()
