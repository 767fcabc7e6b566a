"""Whole tensors from their pieces: the proof that the pieces of a tensor cover it, once each.

There are two. `assemble` holds every piece and is exact: readers use it, and error messages. `cover`
proves the same for a run of any size with one number per rank, so that the committing rank need not list millions of
chunks. A chunk from l to h (per dim d) is the polynomial product_d (x_d^l_d - x_d^h_d); pieces
tile a tensor of shape n if and only if their polynomials add up to product_d (1 - x_d^n_d). Every rank evaluates its
polynomials at one point modulo a prime, weighted by a hash of the tensor; the rank with a tensor's first element
subtracts the value of the whole. If the sum over all ranks is 0 and no tensor begins twice, all tensors are whole: two
different polynomials agree at a point with a chance of degree / 2**127 (Schwartz 1980, Zippel 1979).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stoker.checkpoint.format import Piece, ShardIndex
from stoker.parallel.shards import Chunk, whole

PRIME = (1 << 127) - 1


@dataclass(frozen=True)
class StoredPiece:
    rank: int  # the writer of its shard file
    piece: Piece


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor and the positions of its pieces, which tile it exactly."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]

    @property
    def label(self) -> str:
        return f"{self.kind}/{self.name}"


def cover(pieces: Iterable[Piece]) -> tuple[int, tuple[str, ...]]:
    """This file's share of the proof, from 0 to PRIME, and which tensors begin in it, each as a short hash."""
    total, origins = 0, []
    for piece in pieces:
        weight = _weight(piece.tensor, piece.dtype, piece.shape)
        total += weight * _value(piece.chunk)
        if not any(piece.chunk.offsets):
            total -= weight * _value(whole(piece.shape))
            origins.append(origin(piece.tensor, piece.dtype, piece.shape))
    return total % PRIME, tuple(origins)


def origin(tensor: str, dtype: str, shape: tuple[int, ...]) -> str:
    """The short hash by which the index of the file in which a tensor begins names it."""
    return f"{_weight(tensor, dtype, shape):032x}"[-16:]


def _weight(tensor: str, dtype: str, shape: tuple[int, ...]) -> int:
    return _hash(f"{tensor} {dtype} {shape}")


def _value(chunk: Chunk) -> int:
    value = 1
    for dim, (low, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        point = _hash(f"dim {dim}")
        value = value * (pow(point, low, PRIME) - pow(point, low + length, PRIME)) % PRIME
    return value


@functools.lru_cache(maxsize=1 << 16)
def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()) % PRIME


def assemble(indexes: Iterable[ShardIndex]) -> dict[tuple[str, str], StoredTensor]:
    """The tensors that `indexes` hold together, by (kind, name), in the order of the first rank that has each.

    Raises ValueError, naming the tensor, when pieces differ in shape or dtype, overlap, or leave a gap.
    """
    found: dict[tuple[str, str], list[StoredPiece]] = {}
    for index in indexes:
        for piece in index.pieces:
            found.setdefault((piece.kind, piece.name), []).append(StoredPiece(index.rank, piece))
    return {key: _tensor(pieces) for key, pieces in found.items()}


def _tensor(pieces: list[StoredPiece]) -> StoredTensor:
    first = pieces[0]
    for other in pieces:
        if (other.piece.shape, other.piece.dtype) != (first.piece.shape, first.piece.dtype):
            raise ValueError(
                f"{first.piece.tensor}: {first.piece.dtype} {first.piece.shape} for rank {first.rank}, "
                f"{other.piece.dtype} {other.piece.shape} for rank {other.rank}"
            )
    problem = tiling_problem(first.piece.shape, [stored.piece.chunk for stored in pieces])
    if problem:
        ranks = sorted({stored.rank for stored in pieces})
        raise ValueError(f"{first.piece.tensor} of shape {first.piece.shape}, written by ranks {ranks}: {problem}")
    piece = first.piece
    return StoredTensor(piece.name, piece.kind, piece.dtype, piece.shape, tuple(pieces))


def tiling_problem(shape: tuple[int, ...], chunks: Sequence[Chunk]) -> str | None:
    """Why `chunks`, each inside `shape`, do not cover each of its elements exactly once; None if they do.

    Chunks that do not overlap and together have as many elements as the whole leave none out. The sweep compares each
    only with those that overlap it along the most finely split dim.
    """
    solid = [chunk for chunk in chunks if chunk.numel]
    if shape and solid:
        dim = max(range(len(shape)), key=lambda d: len({chunk.offsets[d] for chunk in solid}))
        solid.sort(key=lambda chunk: chunk.offsets[dim])
        reaching: list[Chunk] = []
        for chunk in solid:
            reaching = [r for r in reaching if r.offsets[dim] + r.sizes[dim] > chunk.offsets[dim]]
            for other in reaching:
                if chunk.intersection(other):
                    return f"{_describe(other)} and {_describe(chunk)} overlap"
            reaching.append(chunk)
    total, covered = math.prod(shape), sum(chunk.numel for chunk in solid)
    return None if covered == total else f"{covered} of its {total} elements are written"


def _describe(chunk: Chunk) -> str:
    ends = (start + length for start, length in zip(chunk.offsets, chunk.sizes, strict=True))
    return f"[{', '.join(f'{start}:{end}' for start, end in zip(chunk.offsets, ends, strict=True))}]"
