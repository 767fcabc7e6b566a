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
from parallel.shards import PARAMETER, Rectangle, Shard, whole

_CHUNK_BYTES = 64 << 20  # read at one time, unless one row of a tensor is longer
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
    index = decode_index(_read_listed(checkpoint, manifest, name), str(checkpoint / name))
    if (index.rank, index.step, index.attempt) != (rank, manifest.step, manifest.attempt):
        raise DamagedCheckpoint(f"{checkpoint / name}: not of this checkpoint")
    return index


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What was saved that is not a tensor. Raises DamagedCheckpoint."""
    return _state(checkpoint, read_manifest(checkpoint))


def _state(checkpoint: Path, manifest: Manifest) -> dict[str, Any]:
    return decode_state(_read_listed(checkpoint, manifest, STATE), str(checkpoint / STATE))


def _read_listed(checkpoint: Path, manifest: Manifest, name: str) -> bytes:
    data = read_json_bytes(checkpoint / name)
    if digest(data) != manifest.files[name]:
        raise DamagedCheckpoint(f"{checkpoint / name}: changed since it was written")
    return data


def open_checkpoint(checkpoint: Path) -> Stored:
    """Reads and checks everything but state and tensor data. Raises DamagedCheckpoint or CheckpointMismatch."""
    manifest = read_manifest(checkpoint)
    indexes = {rank: read_index(checkpoint, manifest, rank) for rank in manifest.ranks}
    try:
        return Stored(checkpoint, manifest, indexes, assemble(indexes.values()))
    except ValueError as error:
        raise DamagedCheckpoint(f"{checkpoint}: {error}") from None


class BlockReader:
    """Reads byte ranges of one shard file in whole blocks, each checked against its CRC32."""

    def __init__(self, checkpoint: Path, index: ShardIndex) -> None:
        self.path = checkpoint / data_name(index.rank)
        self.index = index
        self._descriptor = open_to_read(self.path)
        self._kept = (0, 0)  # the blocks in memory: small tensors that follow each other share one
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

    def read(self, start: int, stop: int, label: str) -> Tensor:
        """Bytes start to stop of the file, uint8, valid until the next call. Raises DamagedCheckpoint for `label`."""
        size = self.index.block_bytes
        first, last = start // size, -(-stop // size)
        if not self._kept[0] <= first <= last <= self._kept[1]:
            self._kept = (0, 0)
            self._bytes = self._read_blocks(first, last, label)
            self._kept = (first, last)
        begin = self._kept[0] * size
        return self._bytes[start - begin : stop - begin]

    def _read_blocks(self, first: int, last: int, label: str) -> Tensor:
        size = self.index.block_bytes
        data = torch.empty(min(last * size, self.index.file_bytes) - first * size, dtype=torch.uint8)
        view = data.numpy().data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], first * size + done)
            except OSError as error:
                raise DamagedCheckpoint(f"{self.path}: {label}: {error.strerror}") from None
            if not count:
                raise DamagedCheckpoint(f"{self.path}: {label}: the file ends too early")
            done += count
        for block in range(first, last):
            begin = (block - first) * size
            if zlib.crc32(view[begin : begin + size]) != self.index.blocks[block]:
                raise DamagedCheckpoint(f"{self.path}: {label}: block {block} has changed since it was written")
        return data


def copy_piece(reader: BlockReader, piece: Piece, wanted: Rectangle, buffer: Tensor) -> None:
    """Copies the elements of `piece` that lie in `wanted` to `buffer`, which holds `wanted`."""
    common = piece.rectangle.intersection(wanted) if piece.bytes else None
    if common is None:
        return
    dtype = DTYPES[piece.dtype]
    if not piece.shape:
        buffer.copy_(reader.read(piece.start, piece.stop, piece.tensor).view(dtype).view(()))
        return
    row_bytes = piece.bytes // piece.rectangle.size[0]
    chunk = max(1, _CHUNK_BYTES // row_bytes)
    first = common.offset[0] - piece.rectangle.offset[0]
    for done in range(0, common.size[0], chunk):
        rows = min(chunk, common.size[0] - done)
        start = piece.start + (first + done) * row_bytes
        data = reader.read(start, start + rows * row_bytes, piece.tensor)
        held = piece.rectangle.rows(first + done, first + done + rows)
        part = common.rows(done, done + rows)
        buffer[part.within(wanted)] = data.view(dtype).view(held.size)[part.within(held)]


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


def read_tensors(
    checkpoint: Path, kind: str = PARAMETER, select: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors of `kind` whose name `select` takes, one at a time, every byte checked.

    Raises DamagedCheckpoint as soon as something read is bad: what has been given before is sound.
    """
    stored = open_checkpoint(checkpoint)
    readers: dict[int, BlockReader] = {}
    try:
        for tensor in stored.tensors.values():
            if tensor.kind != kind or not select(tensor.name):
                continue
            value = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
            for owned in tensor.pieces:
                if owned.rank not in readers:
                    readers[owned.rank] = BlockReader(checkpoint, stored.indexes[owned.rank])
                copy_piece(readers[owned.rank], owned.piece, whole(tensor.shape), value)
            yield tensor.name, value
    finally:
        for reader in readers.values():
            reader.close()
