"""Reading a shard file: each block in one read from the file to its destination, and checked there.

The kernel copies a block straight into the tensors that it is a part of (preadv takes a list of places), so that its
bytes are touched twice, by that copy and by the checksum. Only parts that are not contiguous at their destination, such
as columns of a matrix, or whose destination is a GPU, are read into scratch memory and copied from there.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stoker.checkpoint.block_writer import crc32
from stoker.checkpoint.format import Piece, ShardIndex
from stoker.checkpoint.names import DamagedCheckpoint, data_name
from stoker.checkpoint.storage import open_to_read
from stoker.parallel.dtypes import DTYPES
from stoker.parallel.shards import Chunk, flat_range

_MOST_PLACES = 1024  # that one preadv takes
_NAMED = 5  # tensors that a message names


class BlockReader:
    """Reads the blocks of one shard file, each checked against its CRC32."""

    def __init__(self, checkpoint: Path, index: ShardIndex) -> None:
        self.path = checkpoint / data_name(index.rank)
        self.index = index
        self._descriptor = open_to_read(self.path)
        self._aside = torch.empty(0, dtype=torch.uint8)
        self._held: int | None = None  # the last block read into scratch memory: consecutive small tensors share one
        size = os.fstat(self._descriptor).st_size
        if size != index.file_bytes:
            self.close()
            raise DamagedCheckpoint(f"{self.path}: {size} bytes instead of {index.file_bytes}")

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def extent(self, number: int) -> tuple[int, int]:
        """From which byte of the file to which a block goes."""
        start = number * self.index.block_bytes
        return start, min(start + self.index.block_bytes, self.index.file_bytes)

    def holds(self, number: int) -> bool:
        """Whether `block` needs no read."""
        return self._held == number

    def block(self, number: int, label: str) -> Tensor:
        """The bytes of a block, uint8, valid until the next block is read. Raises DamagedCheckpoint for `label`."""
        start, stop = self.extent(number)
        if self._held != number:
            self.read(number, [self.aside(number, start, stop)], label)
            self._held = number
        return self._aside[: stop - start]

    def aside(self, number: int, start: int, stop: int) -> memoryview:
        """Scratch memory for bytes of a block that no tensor needs, or that must be copied. Ends `block`'s view."""
        self._held = None
        if not self._aside.numel():
            self._aside = torch.empty(min(self.index.block_bytes, self.index.file_bytes), dtype=torch.uint8)
        first, _ = self.extent(number)
        return self._aside.numpy().data[start - first : stop - first]

    def read(self, number: int, places: Sequence[memoryview], label: str) -> None:
        """Reads a block into `places`, which together are as long as it. Raises DamagedCheckpoint for `label`."""
        offset, _ = self.extent(number)
        missing = deque(places)
        while missing:
            batch = [missing[n] for n in range(min(len(missing), _MOST_PLACES))]
            try:
                count = os.preadv(self._descriptor, batch, offset)
            except OSError as error:
                raise DamagedCheckpoint(f"{self.path}: {label}: {error.strerror}") from None
            if not count:
                raise DamagedCheckpoint(f"{self.path}: {label}: the file ends too early")
            offset += count
            while missing and count >= len(missing[0]):
                count -= len(missing.popleft())
            if count:
                missing[0] = missing[0][count:]
        checksum = 0
        for place in places:
            checksum = crc32(place, checksum)
        if checksum != self.index.blocks[number]:
            raise DamagedCheckpoint(f"{self.path}: {label}: block {number} has changed since it was written")


@dataclass(frozen=True)
class Wanted:
    """The elements of `piece` that lie in `chunk` go to `buffer`, which holds `chunk`."""

    piece: Piece
    chunk: Chunk
    buffer: Tensor


def read_wanted(reader: BlockReader, wanted: Sequence[Wanted]) -> None:
    """Reads the wanted pieces of a shard file, from its beginning to its end. Blocks without any are not read."""
    waiting = deque(sorted(filter(None, map(_stretch, wanted)), key=lambda stretch: stretch.start))
    reached: list[_Stretch] = []
    number = 0
    while waiting or reached:
        if not reached:
            number = max(number, waiting[0].start // reader.index.block_bytes)
        stop = reader.extent(number)[1]
        while waiting and waiting[0].start < stop:
            reached.append(waiting.popleft())
        _read_block(reader, number, reached)
        reached = [stretch for stretch in reached if stretch.stop > stop]
        number += 1


@dataclass(frozen=True)
class _Stretch:
    """The rows of a piece that hold wanted elements: bytes `start` to `stop` of the file."""

    wanted: Wanted
    start: int
    stop: int
    place: memoryview | None  # the contiguous destination of these bytes; None: to be copied part by part


def _stretch(wanted: Wanted) -> _Stretch | None:
    piece, size = wanted.piece, wanted.piece.chunk.sizes
    common = piece.chunk.intersection(wanted.chunk) if piece.bytes else None
    if common is None:
        return None
    start, stop = piece.start, piece.stop
    if size:
        row_bytes = piece.bytes // size[0]
        start += (common.offsets[0] - piece.chunk.offsets[0]) * row_bytes
        stop = start + common.sizes[0] * row_bytes
    there = wanted.buffer[common.within(wanted.chunk)]
    in_one_piece = common.sizes[1:] == size[1:] and there.is_contiguous() and there.device.type == "cpu"
    place = there.reshape(-1).view(torch.uint8).numpy().data if in_one_piece else None
    return _Stretch(wanted, start, stop, place)


def _read_block(reader: BlockReader, number: int, stretches: Sequence[_Stretch]) -> None:
    labels = list(dict.fromkeys(stretch.wanted.piece.tensor for stretch in stretches[: _NAMED + 1]))
    label = ", ".join(labels[:_NAMED]) + (", ..." if len(labels) > _NAMED else "")
    places = None if reader.holds(number) else _places(reader, number, stretches)
    if places is not None:
        reader.read(number, places, label)
        return
    data = reader.block(number, label)
    start, stop = reader.extent(number)
    for stretch in stretches:
        _copy(data, start, max(start, stretch.start), min(stop, stretch.stop), stretch.wanted)


def _places(reader: BlockReader, number: int, stretches: Sequence[_Stretch]) -> list[memoryview] | None:
    """The destinations of a block's bytes. None if they have to be copied, or if so few of them are wanted that the
    block is better read into scratch memory, where the next tensor in it finds it."""
    start, stop = reader.extent(number)
    places, at, gaps = [], start, 0
    for stretch in stretches:
        first, last = max(start, stretch.start), min(stop, stretch.stop)
        if stretch.place is None or first < at:  # `first < at`: two stretches need the same bytes
            return None
        if first > at:
            gaps += first - at
            places.append(reader.aside(number, at, first))
        places.append(stretch.place[first - stretch.start : last - stretch.start])
        at = last
    if at < stop:
        gaps += stop - at
        places.append(reader.aside(number, at, stop))
    return places if 2 * gaps < stop - start else None


def _copy(data: Tensor, start: int, first: int, last: int, wanted: Wanted) -> None:
    """Copies the wanted parts of bytes `first` to `last` of the file; `data` begins with byte `start`."""
    piece, buffer = wanted.piece, wanted.buffer
    dtype, size, offset = DTYPES[piece.dtype], piece.chunk.sizes, piece.chunk.offsets
    elements = data[first - start : last - start].view(dtype)
    done = 0
    for inside in flat_range(size, *((byte - piece.start) // dtype.itemsize for byte in (first, last))):
        there = inside.moved(offset)
        part = there.intersection(wanted.chunk)
        if part is not None:
            held = elements[done : done + inside.numel].view(inside.sizes)
            buffer[part.within(wanted.chunk)] = held[part.within(there)]
        done += inside.numel
