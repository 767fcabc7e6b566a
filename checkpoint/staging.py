"""The staging pool: memory for the image of this rank's shard file, filled from live tensors and reused.

With a limit the pool is smaller than the file, which passes through it in windows: each is filled when the one before
has been written. The snapshot is then complete only with the last window, and training waits for the disk.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stoker.checkpoint.format import BLOCK_BYTES, Piece
from stoker.checkpoint.memory import fresh_bytes
from stoker.checkpoint.plan import FilePlan, plan_file
from stoker.parallel.dtypes import DTYPES
from stoker.parallel.shards import Shard, flat_range, whole


class StagingPool:
    """Holds one snapshot at a time. Pinned when the data are on CUDA, so that copies run beside the GPU's work.

    At most `limit` bytes, but at least one block of `block_bytes`.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES, limit: int | None = None) -> None:
        self._block_bytes, self._limit = block_bytes, limit
        self._described: list[Any] = []
        self._plan: FilePlan | None = None
        self._image = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    @property
    def bytes(self) -> int:
        return self._image.numel()

    def prepare(self, shards: Sequence[Shard]) -> FilePlan:
        """The file of `shards`, with memory for it. Free of cost when their descriptions have not changed.

        Raises ValueError for shards that cannot be stored.
        """
        described = [_description(shard) for shard in shards]
        if self._plan is None or described != self._described:
            self._plan = plan_file(shards)
            self._described = described
            size, pinned = self._size(self._plan.file_bytes), any(shard.data.is_cuda for shard in shards)
            if (self.bytes, self._pinned) != (size, pinned):
                self._image = torch.empty(0, dtype=torch.uint8)  # free the old memory first
                self._image = torch.empty(size, dtype=torch.uint8, pin_memory=True) if pinned else fresh_bytes(size)
                self._pinned = pinned
                self._image.zero_()  # touches every page now rather than in the first snapshot
        return self._plan

    def _size(self, file_bytes: int) -> int:
        if self._limit is None or file_bytes <= self._limit:
            return file_bytes
        return min(file_bytes, max(1, self._limit // self._block_bytes) * self._block_bytes)

    def fill(self, shards: Sequence[Shard], snapshot: Snapshot) -> Iterator[memoryview]:
        """The shard file's bytes, window by window, each copied from `shards` on demand.

        With the last one `snapshot` is complete.
        """
        plan = self.prepare(shards)
        streams = snapshot.begin()
        view = self._image.numpy().data
        for start in range(0, plan.file_bytes, self.bytes):
            stop = min(start + self.bytes, plan.file_bytes)
            header = torch.frombuffer(bytearray(plan.header), dtype=torch.uint8)[start:stop]
            self._image[: header.numel()] = header
            with torch.no_grad():
                for copied in _overlapping(plan, start, stop):
                    self._copy(plan.pieces[copied], shards[plan.sources[copied]], start, stop, streams)
            last = stop == plan.file_bytes
            if last:
                snapshot.enqueued(streams)
            snapshot.synchronize(streams)
            yield view[: stop - start]

    def _copy(self, piece: Piece, shard: Shard, start: int, stop: int, streams: dict[Any, Any]) -> None:
        """The elements of `piece` between bytes `start` and `stop` of the file."""
        dtype, size = DTYPES[piece.dtype], piece.chunk.sizes
        part = shard.data.detach()[piece.chunk.within(shard.chunk)]
        first, last = max(start, piece.start), min(stop, piece.stop)
        place = self._image[first - start : last - start].view(dtype)
        with torch.cuda.stream(streams.get(part.device)):
            if (first, last) == (piece.start, piece.stop):
                place.view(size).copy_(part, non_blocking=True)
                return
            done = 0
            elements = ((byte - piece.start) // dtype.itemsize for byte in (first, last))
            for chunk in flat_range(size, *elements):
                there = place[done : done + chunk.numel].view(chunk.sizes)
                there.copy_(part[chunk.within(whole(size))], non_blocking=True)
                done += chunk.numel


def _overlapping(plan: FilePlan, start: int, stop: int) -> range:
    """The pieces that have bytes between `start` and `stop` of the file."""
    first = bisect.bisect_right(plan.pieces, start, key=lambda piece: piece.stop)
    return range(first, bisect.bisect_left(plan.pieces, stop, key=lambda piece: piece.start))


def _description(shard: Shard) -> tuple[Any, ...]:
    """The key of a shard's plan: everything but its values."""
    place = (shard.name, shard.kind, shard.shape, shard.chunk, shard.replica, shard.replicas)
    return *place, shard.data.dtype, shard.data.shape


class Snapshot:
    """The moment whose values are saved: begun by the trainer's thread, copied by the writer's.

    On CUDA the copies run on a side stream that starts after the work which the trainer had queued by then; the next
    update is queued after the copies. Neither makes the host wait for the device.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        devices = {shard.data.device for shard in shards if shard.data.is_cuda}
        self._present = {device: torch.cuda.current_stream(device).record_event() for device in devices}
        self._copied: dict[torch.device, torch.cuda.Event] = {}
        self._staged = threading.Event()

    def begin(self) -> dict[torch.device, torch.cuda.Stream]:
        """The streams to copy on, by device."""
        streams = {device: torch.cuda.Stream(device) for device in self._present}
        for device, stream in streams.items():
            stream.wait_event(self._present[device])
        return streams

    def enqueued(self, streams: dict[torch.device, torch.cuda.Stream]) -> None:
        """Every copy has been made or queued: from here on `await_staged` returns."""
        self._copied = {device: stream.record_event() for device, stream in streams.items()}
        self._staged.set()

    def synchronize(self, streams: dict[torch.device, torch.cuda.Stream]) -> None:
        """Wait, in the writer's thread, until the copies have been made."""
        for stream in streams.values():
            stream.synchronize()

    def give_up(self) -> None:
        """Nothing (more) will be copied."""
        self._staged.set()

    def await_staged(self) -> None:
        """Return when the caller's next operations may change the live data."""
        self._staged.wait()
        for device, event in self._copied.items():
            torch.cuda.current_stream(device).wait_event(event)
