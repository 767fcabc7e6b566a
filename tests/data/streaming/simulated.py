"""Ranks in one process: each stream has its thread, and ranks communicate through a hub."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from stoker.data.streaming.loader import StreamingLoader
from stoker.parallel.batch import IGNORE_INDEX, Batch
from tests.data.batches import digest, together


class Hub:
    """Where the ranks of one world meet."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.told: dict[int, np.ndarray] = {}


@dataclasses.dataclass
class Simulated:
    """The exchange of one rank: `peer` 0 of each data-parallel rank reads."""

    hub: Hub
    dp_rank: int
    peer: int

    @property
    def reads(self) -> bool:
        return self.peer == 0

    def gather(self, mine: np.ndarray) -> np.ndarray:
        told = self._tell(mine)
        return np.concatenate([told[rank] for rank in sorted(told)])

    def share(self, rows: np.ndarray) -> None:
        rows[...] = self._tell(rows.copy())[self.dp_rank]

    def compare(self, rows: np.ndarray) -> None:
        assert (self._tell(rows.copy())[self.dp_rank] == rows).all()

    def _tell(self, mine: np.ndarray) -> dict[int, np.ndarray]:
        if self.reads:
            self.hub.told[self.dp_rank] = mine
        self.hub.barrier.wait()
        told = dict(self.hub.told)
        self.hub.barrier.wait()
        return told


OpenStream = Callable[..., StreamingLoader]  # (dp_rank, dp, exchange, workers, prefetch)


class World:
    """Streams of all ranks of a layout, `peers` of them for each data-parallel rank."""

    def __init__(self, open_stream: OpenStream, dp: int = 1, peers: int = 1, workers: int = 0, prefetch: int = 2):
        hub = Hub(dp * peers)
        self.dp, self.peers = dp, peers
        self.streams = [
            open_stream(rank, dp, exchange=Simulated(hub, rank, peer), workers=workers, prefetch=prefetch)
            for rank in range(dp)
            for peer in range(peers)
        ]
        self._threads = ThreadPoolExecutor(len(self.streams))

    def each(self, work: Callable[[StreamingLoader], Any]) -> list[Any]:
        """`work` on every rank at once; results in rank order."""
        return list(self._threads.map(work, self.streams))

    def load(self, state: dict[str, Any]) -> None:
        self.each(lambda stream: stream.load_state(json.loads(json.dumps(state))))

    def state(self) -> dict[str, Any]:
        """The state, which must be equal on all ranks."""
        states = {json.dumps(stream.state(), sort_keys=True) for stream in self.streams}
        assert len(states) == 1
        return json.loads(states.pop())

    def next(self) -> Batch:
        """The rows of the next global batch; equal on the peers of each data-parallel rank."""
        parts = self.each(lambda stream: stream.next())
        for place in range(0, len(parts), self.peers):
            for peer in parts[place + 1 : place + self.peers]:
                assert digest(peer) == digest(parts[place])
        return together(parts[:: self.peers])

    def batches(self, count: int | None = None) -> list[Batch]:
        """So many batches, or all that are left."""
        found: list[Batch] = []
        while count is None or len(found) < count:
            ends = self.each(lambda stream: stream.exhausted)
            assert len(set(ends)) == 1
            if ends[0]:
                break
            found.append(self.next())
        return found

    def close(self) -> None:
        self.each(lambda stream: stream.close())
        self._threads.shutdown()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def batches(open_stream: OpenStream, count: int | None, splits: Sequence[dict] = ({},)) -> list[Batch]:
    """Batches of a run that is started anew, from its state, for each of `splits`: the options of its `World`, and
    `batches`, how many it hands out (the last split: what is left of `count`)."""
    found: list[Batch] = []
    state = None
    for number, split in enumerate(splits):
        options = dict(split)
        most = options.pop("batches", None)
        with World(open_stream, **options) as world:
            if state is not None:
                world.load(state)
                assert world.state() == state
            last = number == len(splits) - 1
            found += world.batches((None if count is None else count - len(found)) if last else most)
            state = world.state()
    return found


def digests(found: Sequence[Batch]) -> list[str]:
    return [digest(rows) for rows in found]


def stream_tokens(found: Sequence[Batch], streams: int) -> list[list[int]]:
    """The tokens of each stream, in order; padding left out."""
    tokens: list[list[int]] = [[] for _ in range(streams)]
    for rows in found:
        for place in range(len(rows)):
            labelled = rows.labels[place] != IGNORE_INDEX
            tokens[place % streams] += rows.tokens[place][labelled].tolist()
    return tokens
