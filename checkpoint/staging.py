"""The staging pool: memory for the image of this rank's shard file, filled from live tensors and used again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from checkpoint.format import DTYPES
from checkpoint.plan import FilePlan, plan_file
from parallel.shards import Shard


class StagingPool:
    """Holds one snapshot at a time. Pinned when the data are on CUDA, so that copies run beside the GPU's work."""

    def __init__(self) -> None:
        self._described: list[Any] = []
        self._plan: FilePlan | None = None
        self._image = torch.empty(0, dtype=torch.uint8)

    def prepare(self, shards: Sequence[Shard]) -> FilePlan:
        """The file of `shards`, with memory for it. Costs nothing when they are described as they were last time.

        Raises ValueError for shards that cannot be stored.
        """
        described = [_description(shard) for shard in shards]
        pinned = any(shard.data.is_cuda for shard in shards)
        if self._plan is None or described != self._described:
            self._plan = plan_file(shards)
            self._described = described
            if self._image.numel() != self._plan.file_bytes or self._image.is_pinned() != pinned:
                self._image = torch.empty(0, dtype=torch.uint8)  # give the old memory back first
                self._image = torch.empty(self._plan.file_bytes, dtype=torch.uint8, pin_memory=pinned)
                self._image.zero_()  # touches every page now rather than in the first snapshot
            self._image[: len(self._plan.header)] = torch.frombuffer(bytearray(self._plan.header), dtype=torch.uint8)
        return self._plan

    def image(self) -> memoryview:
        """The shard file's bytes: all of them once a snapshot is complete."""
        return self._image.numpy().data

    def fill(self, shards: Sequence[Shard], snapshot: Snapshot) -> FilePlan:
        """Copies what this rank writes of `shards` into the image. On return `snapshot` is complete."""
        plan = self.prepare(shards)
        streams = snapshot.begin()
        with torch.no_grad():
            for piece, source in zip(plan.pieces, plan.sources, strict=True):
                if not piece.bytes:
                    continue
                shard = shards[source]
                part = shard.data.detach()[piece.rectangle.within(shard.rectangle)]
                place = self._image[piece.start : piece.stop].view(DTYPES[piece.dtype]).view(piece.rectangle.size)
                with torch.cuda.stream(streams.get(part.device)):
                    place.copy_(part, non_blocking=True)
        snapshot.enqueued(streams)
        snapshot.synchronize()
        return plan


def _description(shard: Shard) -> tuple[Any, ...]:
    """What the plan of a shard depends on: everything but its values."""
    place = (shard.name, shard.kind, shard.shape, shard.rectangle, shard.replica, shard.replicas)
    return *place, shard.data.dtype, shard.data.shape


class Snapshot:
    """The moment whose values are saved: begun by the trainer's thread, copied by the writer's.

    On CUDA the copies run on a side stream that starts behind the work which the trainer had queued by then; the next
    update is queued behind the copies. Neither makes the host wait for the device.
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

    def synchronize(self) -> None:
        """Wait, in the writer's thread, until the copies have been made."""
        for event in self._copied.values():
            event.synchronize()

    def give_up(self) -> None:
        """Nothing (more) will be copied."""
        self._staged.set()

    def await_staged(self) -> None:
        """Return when the live data may be changed by what the caller does or queues next."""
        self._staged.wait()
        for device, event in self._copied.items():
            torch.cuda.current_stream(device).wait_event(event)
