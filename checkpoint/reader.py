"""Reading a checkpoint: every byte used has been checked, and nothing live is touched before `adopt`."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.format import (
    DTYPE_NAMES,
    DTYPES,
    Manifest,
    Piece,
    ShardIndex,
    decode_index,
    decode_manifest,
    decode_state,
    digest,
)
from checkpoint.names import (
    MANIFEST,
    STATE,
    CheckpointMismatch,
    DamagedCheckpoint,
    data_name,
    index_name,
    step_of,
)
from checkpoint.storage import open_to_read, read_json_bytes
from checkpoint.tiling import StoredTensor, assemble
from parallel.shards import PARAMETER, Rectangle, Shard, flat_range, whole

_AHEAD_BLOCKS = 8  # that the disk fetches while one is checked
_NAMED = 5  # tensors of each kind that a message names


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose manifest, indexes and tiling have been checked. Its blocks are checked as they are read."""

    path: Path
    manifest: Manifest
    indexes: dict[int, ShardIndex]  # by rank
    tensors: dict[tuple[str, str], StoredTensor]  # by (kind, name)


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises DamagedCheckpoint when there is no valid one, CheckpointMismatch when it is of another format."""
    manifest = decode_manifest(read_json_bytes(checkpoint / MANIFEST), str(checkpoint / MANIFEST))
    named = step_of(checkpoint)
    if named is not None and named != manifest.step:
        raise DamagedCheckpoint(f"{checkpoint}: named as step {named}, but it holds step {manifest.step}")
    return manifest


def read_index(checkpoint: Path, manifest: Manifest, rank: int) -> ShardIndex:
    """The index of one writer. Raises DamagedCheckpoint, naming the file."""
    name = index_name(rank)
    data = read_json_bytes(checkpoint / name)
    _check_listed(checkpoint, manifest, name, data.partition(b"\n")[0])  # its head, which answers for the rest
    index = decode_index(data, str(checkpoint / name))
    if (index.rank, index.step, index.attempt) != (rank, manifest.step, manifest.attempt):
        raise DamagedCheckpoint(f"{checkpoint / name}: not of this checkpoint")
    return index


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What was saved that is not a tensor. Raises DamagedCheckpoint."""
    return _state(checkpoint, read_manifest(checkpoint))


def _state(checkpoint: Path, manifest: Manifest) -> dict[str, Any]:
    data = read_json_bytes(checkpoint / STATE)
    _check_listed(checkpoint, manifest, STATE, data)
    return decode_state(data, str(checkpoint / STATE))


def _check_listed(checkpoint: Path, manifest: Manifest, name: str, data: bytes) -> None:
    if digest(data) != manifest.files[name]:
        raise DamagedCheckpoint(f"{checkpoint / name}: changed since it was written")


def open_checkpoint(checkpoint: Path) -> Stored:
    """Reads and checks everything but state and tensor data. Raises DamagedCheckpoint or CheckpointMismatch."""
    manifest = read_manifest(checkpoint)
    indexes = {rank: read_index(checkpoint, manifest, rank) for rank in manifest.ranks}
    try:
        return Stored(checkpoint, manifest, indexes, assemble(indexes.values()))
    except ValueError as error:
        raise DamagedCheckpoint(f"{checkpoint}: {error}") from None


class BlockReader:
    """Reads one shard file block by block, each checked against its CRC32; one block is in memory."""

    def __init__(self, checkpoint: Path, index: ShardIndex) -> None:
        self.path = checkpoint / data_name(index.rank)
        self.index = index
        self._descriptor = open_to_read(self.path)
        self._held: int | None = None  # the block in memory: small tensors that follow each other share one
        self._bytes = torch.empty(0, dtype=torch.uint8)
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

    def block(self, number: int, label: str) -> Tensor:
        """The bytes of a block, uint8, valid until the next call. Raises DamagedCheckpoint for `label`."""
        size = self.index.block_bytes
        length = min(size, self.index.file_bytes - number * size)
        if self._held == number:
            return self._bytes[:length]
        self._held = None
        if not self._bytes.numel():
            self._bytes = torch.empty(min(size, self.index.file_bytes), dtype=torch.uint8)
        view = self._bytes.numpy().data[:length]
        done = 0
        while done < length:
            try:
                count = os.preadv(self._descriptor, [view[done:]], number * size + done)
            except OSError as error:
                raise DamagedCheckpoint(f"{self.path}: {label}: {error.strerror}") from None
            if not count:
                raise DamagedCheckpoint(f"{self.path}: {label}: the file ends too early")
            done += count
        if zlib.crc32(view) != self.index.blocks[number]:
            raise DamagedCheckpoint(f"{self.path}: {label}: block {number} has changed since it was written")
        self._held = number
        return self._bytes[:length]

    def expect(self, start: int, stop: int) -> None:
        """Let the disk fetch these bytes of the file while we check and copy others."""
        if stop > start and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)


def copy_piece(reader: BlockReader, piece: Piece, wanted: Rectangle, buffer: Tensor) -> None:
    """Copies the elements of `piece` that lie in `wanted` to `buffer`, which holds `wanted`.

    Reads the blocks in which the wanted rows stand, and copies from each straight to its place.
    """
    common = piece.rectangle.intersection(wanted) if piece.bytes else None
    if common is None:
        return
    dtype, size, offset = DTYPES[piece.dtype], piece.rectangle.size, piece.rectangle.offset
    start, stop = piece.start, piece.stop
    if size:
        row_bytes = piece.bytes // size[0]
        start += (common.offset[0] - offset[0]) * row_bytes
        stop = start + common.size[0] * row_bytes
    block_bytes = reader.index.block_bytes
    for number in range(start // block_bytes, -(-stop // block_bytes)):
        begin = number * block_bytes
        reader.expect(begin + block_bytes, min(stop, begin + _AHEAD_BLOCKS * block_bytes))
        data = reader.block(number, piece.tensor)
        first, last = max(start, begin), min(stop, begin + block_bytes)
        elements = data[first - begin : last - begin].view(dtype)
        done = 0
        for inside in flat_range(size, *((byte - piece.start) // dtype.itemsize for byte in (first, last))):
            there = inside.moved(offset)
            part = there.intersection(wanted)
            if part is not None:
                held = elements[done : done + inside.numel].view(inside.size)
                buffer[part.within(wanted)] = held[part.within(there)]
            done += inside.numel


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's values in memory of their own, ready for the shards they were loaded for."""

    state: dict[str, Any]
    values: list[tuple[Shard, Tensor]]

    def adopt(self) -> None:
        """Copies the values into the live shards."""
        with torch.no_grad():
            for shard, value in self.values:
                shard.data.detach().copy_(value)


def load(stored: Stored, shards: Sequence[Shard]) -> Loaded:
    """The state and the values of `shards`, every byte checked. The shards' data stay as they are until `adopt`.

    Raises DamagedCheckpoint naming file, tensor and block, and CheckpointMismatch naming the tensors that are missing
    or of another shape or dtype. Whether a tensor of the checkpoint is too many no rank knows alone: see `unused`.
    """
    refuse(stored.path, mismatches(stored, shards))
    values = [(shard, torch.empty(shard.rectangle.size, dtype=shard.data.dtype)) for shard in shards]
    wanted = [
        (held.rank, held.piece, shard.rectangle, value)
        for shard, value in values
        for held in stored.tensors[shard.kind, shard.name].pieces
        if held.piece.rectangle.intersection(shard.rectangle)
    ]
    wanted.sort(key=lambda entry: (entry[0], entry[1].start))  # through each file once, from its beginning to its end
    for rank, entries in itertools.groupby(wanted, key=lambda entry: entry[0]):
        with BlockReader(stored.path, stored.indexes[rank]) as reader:
            for _, piece, rectangle, value in entries:
                copy_piece(reader, piece, rectangle, value)
    return Loaded(_state(stored.path, stored.manifest), values)


def mismatches(stored: Stored, shards: Sequence[Shard]) -> list[str]:
    """What keeps `stored` from being loaded into `shards`, one line per tensor."""
    found = {}
    for shard in shards:
        label, tensor = f"{shard.kind}/{shard.name}", stored.tensors.get((shard.kind, shard.name))
        dtype = DTYPE_NAMES.get(shard.data.dtype, str(shard.data.dtype))
        if tensor is None:
            found[label] = f"{label} is missing"
        elif tensor.shape != tuple(shard.shape):
            found[label] = f"{label} has shape {tensor.shape}, the model's has {tuple(shard.shape)}"
        elif tensor.dtype != dtype:
            found[label] = f"{label} is {tensor.dtype}, the model's is {dtype}"
    return list(found.values())


def unused(stored: Stored, shards: Sequence[Shard]) -> list[bool]:
    """For each tensor of `stored`, in its order: is none of `shards` a part of it?"""
    used = {(shard.kind, shard.name) for shard in shards}
    return [key not in used for key in stored.tensors]


def refuse(checkpoint: Path, problems: Iterable[str]) -> None:
    """Raises CheckpointMismatch if there are `problems`."""
    listed = sorted(set(problems))
    if listed:
        text = "; ".join(listed[:_NAMED]) + (f"; and {len(listed) - _NAMED} more" if len(listed) > _NAMED else "")
        raise CheckpointMismatch(f"{checkpoint} is not a checkpoint of this model: {text}")


class TensorReader:
    """Whole tensors of a checkpoint, one at a time and in any order, every byte of them checked.

    Opening raises DamagedCheckpoint or CheckpointMismatch. `stored.tensors` lists what there is, by (kind, name).
    """

    def __init__(self, checkpoint: Path) -> None:
        self.stored = open_checkpoint(checkpoint)
        self._readers: dict[int, BlockReader] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers.values():
            reader.close()

    def read(self, name: str, kind: str = PARAMETER) -> Tensor:
        """A tensor in memory of its own. Raises DamagedCheckpoint, and KeyError for one that is not there."""
        tensor = self.stored.tensors[kind, name]
        value = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
        for held in tensor.pieces:
            if held.rank not in self._readers:
                self._readers[held.rank] = BlockReader(self.stored.path, self.stored.indexes[held.rank])
            copy_piece(self._readers[held.rank], held.piece, whole(tensor.shape), value)
        return value


def read_tensors(
    checkpoint: Path, kind: str = PARAMETER, select: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors of `kind` whose name `select` takes, one at a time, every byte checked.

    Raises DamagedCheckpoint as soon as something read is bad: what has been given before is sound.
    """
    with TensorReader(checkpoint) as reader:
        for tensor in reader.stored.tensors.values():
            if tensor.kind == kind and select(tensor.name):
                yield tensor.name, reader.read(tensor.name, kind)
