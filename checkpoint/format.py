"""The contents of a checkpoint's files, as values and as bytes. Nothing here touches a file.

A shard file is a safetensors file. Its index is two lines: the body lists the pieces in the file and the CRC32 of each
block of the FILE, header included; the head, a few hundred bytes before it, holds the body's SHA-256 and all that the
committing rank needs. The manifest holds the SHA-256 of every head and of the state, and of itself: so each byte
of a checkpoint is covered by a checksum that is covered by the manifest. All JSON is written in one canonical form, and
the manifest is accepted only if it is byte for byte what Stoker would write: even a changed space is detected.

Everything decoded here is untrusted input. Decoders check each value and raise DamagedCheckpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stoker.checkpoint.names import STATE, CheckpointMismatch, DamagedCheckpoint, rank_of_index
from stoker.conf.migrations import migrate_state
from stoker.parallel.shards import ITEM_BYTES, Chunk

FORMAT = 1  # of all files of a checkpoint; part of the manifest
BLOCK_BYTES = 4 << 20  # of a shard file under one CRC32

_LARGEST = 1 << 62  # of any number read: what an int64 can count
_LEAST_BLOCK_BYTES = 1 << 10
_COVER_DIGITS = 32  # hexadecimal, of a number below 2**127


@dataclass(frozen=True)
class Piece:
    """A chunk of a global tensor, stored from byte `start` of a shard file, row-major."""

    name: str
    kind: str
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]  # of the global tensor
    chunk: Chunk
    start: int

    @property
    def tensor(self) -> str:
        """The tensor that this is a piece of, for messages: `param/layers.0.w`."""
        return f"{self.kind}/{self.name}"

    @property
    def key(self) -> str:
        """Its name in the safetensors header."""
        return f"{self.tensor}@{','.join(map(str, self.chunk.offsets))}"

    @property
    def bytes(self) -> int:
        return self.chunk.numel * ITEM_BYTES[self.dtype]

    @property
    def stop(self) -> int:
        return self.start + self.bytes


@dataclass(frozen=True)
class ShardIndex:
    """What one rank wrote. As a file, it is this rank's report that its data are on storage."""

    rank: int
    step: int
    attempt: int
    file_bytes: int
    block_bytes: int
    blocks: tuple[int, ...]  # CRC32 of each block
    pieces: tuple[Piece, ...]  # in the order of the file


@dataclass(frozen=True)
class FileDigest:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class ReportHead:
    """The first line of an index: what rank 0 reads of a rank's report, however many pieces there are."""

    rank: int
    step: int
    attempt: int
    file_bytes: int
    cover: int  # `tiling.cover` of the pieces: those of all ranks add up to 0 if every tensor is whole
    origins: tuple[str, ...]  # which tensors begin in this file
    body: FileDigest


@dataclass(frozen=True)
class Manifest:
    """The manifest, which makes a directory a checkpoint."""

    step: int
    attempt: int
    time: float  # of the commit, seconds since the epoch
    bytes: int  # of all shard files
    tensors: int
    files: dict[str, FileDigest]  # the state, and the head of every index

    @property
    def ranks(self) -> list[int]:
        """The ranks that wrote it."""
        return sorted(rank for name in self.files if (rank := rank_of_index(name)) is not None)


def digest(data: bytes) -> FileDigest:
    return FileDigest(hashlib.sha256(data).hexdigest(), len(data))


def safetensors_header(pieces: Sequence[Piece]) -> bytes:
    """The first bytes of a safetensors file that holds `pieces` one after the other, padded to a multiple of 8.

    Of `pieces` only order, dtype and chunk count: their `start` follows from the header's length.
    """
    return safetensors_frame(
        _canonical(safetensors_entries((piece.key, piece.dtype, piece.chunk.sizes, piece.bytes) for piece in pieces))
    )


def safetensors_entries(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> dict[str, Any]:
    """The header entries of consecutive tensors: (name, dtype, shape, bytes) each.

    Raises ValueError for a duplicate name.
    """
    entries: dict[str, Any] = {}
    offset = 0
    for name, dtype, shape, size in tensors:
        if name in entries:
            raise ValueError(f"{name} occurs twice among the shards of this rank")
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    return entries


def safetensors_frame(header: bytes) -> bytes:
    """The first bytes of a file with this JSON header: its length, and the header padded to a multiple of 8."""
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def encode_index(index: ShardIndex, cover: int, origins: Sequence[str]) -> bytes:
    """The file. `cover` and `origins` are those of its pieces (`stoker.checkpoint.tiling`)."""
    pieces = [
        {
            "name": piece.name,
            "kind": piece.kind,
            "dtype": piece.dtype,
            "shape": piece.shape,
            "offset": piece.chunk.offsets,
            "size": piece.chunk.sizes,
            "bytes": [piece.start, piece.stop],
        }
        for piece in index.pieces
    ]
    body = _canonical({"block_bytes": index.block_bytes, "blocks": index.blocks, "pieces": pieces})
    head = ReportHead(index.rank, index.step, index.attempt, index.file_bytes, cover, tuple(origins), digest(body))
    return _canonical(asdict(head) | {"cover": f"{cover:x}"}) + b"\n" + body


def decode_head(head: bytes, where: str) -> ReportHead:
    """The first line of an index. Raises DamagedCheckpoint, naming `where`, for anything else."""
    try:
        values = _object(_parse(head))
        rank, step, attempt, file_bytes = (_number(values[key]) for key in ("rank", "step", "attempt", "file_bytes"))
        cover = _text(values["cover"])
        if len(cover) > _COVER_DIGITS:
            raise ValueError(f"a cover of {len(cover)} digits")
        origins = tuple(_text(origin) for origin in _list(values["origins"]))
        return ReportHead(
            rank, step, attempt, file_bytes, int(cover, 16), origins, _decode_digest(_object(values["body"]))
        )
    except (ValueError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where}: no index of a shard file: {_reason(error)}") from None


def decode_index(data: bytes, where: str) -> ShardIndex:
    """The inverse of `encode_index`. Raises DamagedCheckpoint, naming `where`, for anything else."""
    line, _, body = data.partition(b"\n")
    head = decode_head(line, where)
    if digest(body) != head.body:
        raise DamagedCheckpoint(f"{where}: changed since it was written")
    try:
        values = _object(_parse(body))
        block_bytes = _number(values["block_bytes"])
        blocks = tuple(_number(crc) for crc in _list(values["blocks"]))
        if block_bytes < _LEAST_BLOCK_BYTES or block_bytes % 8 or len(blocks) != -(-head.file_bytes // block_bytes):
            raise ValueError(f"{len(blocks)} checksums of blocks of {block_bytes} bytes for {head.file_bytes} bytes")
        pieces = tuple(_decode_piece(_object(piece), head.file_bytes) for piece in _list(values["pieces"]))
        return ShardIndex(head.rank, head.step, head.attempt, head.file_bytes, block_bytes, blocks, pieces)
    except (ValueError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where}: no index of a shard file: {_reason(error)}") from None


def _decode_piece(values: dict[str, Any], file_bytes: int) -> Piece:
    dtype = _text(values["dtype"])
    if dtype not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}")
    shape, offset, size = (tuple(map(_number, _list(values[key]))) for key in ("shape", "offset", "size"))
    start, stop = map(_number, _list(values["bytes"]))
    piece = Piece(_text(values["name"]), _text(values["kind"]), dtype, shape, Chunk(offset, size), start)
    inside = len(shape) == len(offset) == len(size) and all(
        begin + length <= whole for begin, length, whole in zip(offset, size, shape, strict=True)
    )
    if not inside:
        raise ValueError(f"{piece.tensor}: offset {offset} and size {size} do not fit in shape {shape}")
    if stop != piece.stop or stop > file_bytes or start % ITEM_BYTES[dtype]:
        raise ValueError(f"{piece.tensor}: bytes {start} to {stop} do not hold {size} of {dtype}")
    return piece


def encode_manifest(manifest: Manifest) -> bytes:
    body = {"format": FORMAT, **asdict(manifest)}
    return _canonical(body | {"digest": digest(_canonical(body)).sha256})


def decode_manifest(data: bytes, where: str) -> Manifest:
    """The inverse of `encode_manifest`.

    Raises DamagedCheckpoint, naming `where`, when a byte is not as written, and CheckpointMismatch for a sound
    manifest of a format that this version does not read.
    """
    try:
        body = _object(_parse(data))
        claimed = body.pop("digest")
        if claimed != digest(_canonical(body)).sha256 or _canonical(body | {"digest": claimed}) != data:
            raise ValueError("its digest does not fit")
        if body.pop("format") != FORMAT:
            raise CheckpointMismatch(f"{where}: another format than {FORMAT}: written by another version of Stoker")
        files = {_text(name): _decode_digest(_object(value)) for name, value in _object(body["files"]).items()}
        unexpected = [name for name in files if name != STATE and rank_of_index(name) is None]
        if unexpected or STATE not in files:
            raise ValueError(f"it lists {unexpected[0]!r}" if unexpected else f"it does not list {STATE}")
        if not isinstance(body["time"], float):
            raise ValueError("its time is no number")
        step, attempt, size, tensors = (_number(body[key]) for key in ("step", "attempt", "bytes", "tensors"))
        return Manifest(step, attempt, body["time"], size, tensors, files)
    except CheckpointMismatch:
        raise
    except (ValueError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where}: no valid manifest: {_reason(error)}") from None


def _decode_digest(values: dict[str, Any]) -> FileDigest:
    return FileDigest(_text(values["sha256"]), _number(values["bytes"]))


def encode_state(state: dict[str, Any]) -> bytes:
    """Raises TypeError for a value that JSON does not have."""
    return _canonical(state)


def decode_state(data: bytes, where: str) -> dict[str, Any]:
    """The state of a checkpoint under today's names. Raises DamagedCheckpoint for what is no JSON object."""
    try:
        return migrate_state(_object(_parse(data)))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where}: no state: {_reason(error)}") from None


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _parse(data: bytes) -> Any:
    return json.loads(data.decode())


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, not {_short(value)}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, not {_short(value)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, not {_short(value)}")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(f"expected a count, not {_short(value)}")
    return value


def _short(value: Any) -> str:
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in a list in a list ...
        return type(value).__name__


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
