"""What a rank writes: its pieces and the layout of its shard file, as pure functions of its shards."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stoker.checkpoint.format import Piece, safetensors_header
from stoker.checkpoint.tiling import cover
from stoker.parallel.dtypes import DTYPE_NAMES, DTYPES
from stoker.parallel.shards import Chunk, Shard

SPLIT_ELEMENTS = 1 << 14  # a replicated shard with fewer is written whole by one replica


@dataclass(frozen=True)
class FilePlan:
    """A shard file before its data: where each piece goes, and the position of the shard that it is cut from."""

    header: bytes
    pieces: tuple[Piece, ...]
    sources: tuple[int, ...]
    file_bytes: int
    cover: int  # this file's share of the proof that all tensors are whole (`stoker.checkpoint.tiling`)
    origins: tuple[str, ...]


def pieces_to_write(shard: Shard) -> list[Chunk]:
    """The parts of `shard.chunk` that this replica writes; those of all its replicas tile the chunk.

    A large shard is split along dim 0 over its replicas. A hash of the tensor's name selects the first replica, so that
    small tensors and remainders are spread evenly too.
    """
    chunk = shard.chunk
    if not chunk.numel:
        # An empty tensor is written; an empty share of a tensor is not.
        return [chunk] if 0 in shard.shape and shard.replica == 0 else []
    rows = chunk.sizes[0] if chunk.sizes else 1
    parts = min(rows, shard.replicas) if chunk.numel >= SPLIT_ELEMENTS else 1
    turn = zlib.crc32(f"{shard.kind}/{shard.name}@{chunk.offsets}".encode())
    part = (shard.replica - turn) % shard.replicas
    if part >= parts:
        return []
    return [chunk.rows(rows * part // parts, rows * (part + 1) // parts)] if parts > 1 else [chunk]


def plan_file(shards: Sequence[Shard]) -> FilePlan:
    """The shard file of a rank that holds `shards`.

    Raises ValueError, naming the tensor, for a shard that contradicts itself or has a dtype no checkpoint can hold.
    """
    cut = []
    for position, shard in enumerate(shards):
        _check(shard)
        dtype = DTYPE_NAMES[shard.data.dtype]
        for chunk in pieces_to_write(shard):
            cut.append((Piece(shard.name, shard.kind, dtype, shard.shape, chunk, start=0), position))
    # Wide elements first: as the header is a multiple of 8 bytes, each piece is then aligned to its elements.
    cut.sort(key=lambda entry: -DTYPES[entry[0].dtype].itemsize)
    header = safetensors_header([piece for piece, _ in cut])
    pieces, start = [], len(header)
    for piece, _ in cut:
        pieces.append(replace(piece, start=start))
        start += piece.bytes
    return FilePlan(header, tuple(pieces), tuple(position for _, position in cut), start, *cover(pieces))


def _check(shard: Shard) -> None:
    label, chunk = f"{shard.kind}/{shard.name}", shard.chunk
    if shard.data.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise ValueError(f"{label} has dtype {shard.data.dtype}; a checkpoint holds {known}")
    if tuple(shard.data.shape) != chunk.sizes:
        raise ValueError(f"{label}: data of shape {tuple(shard.data.shape)} for a chunk of {chunk.sizes}")
    inside = len(shard.shape) == len(chunk.offsets) == len(chunk.sizes) and all(
        0 <= start <= start + length <= whole
        for start, length, whole in zip(chunk.offsets, chunk.sizes, shard.shape, strict=True)
    )
    if not inside:
        raise ValueError(f"{label}: {chunk} does not lie in a tensor of shape {shard.shape}")
    if not 0 <= shard.replica < shard.replicas:
        raise ValueError(f"{label}: replica {shard.replica} of {shard.replicas}")
