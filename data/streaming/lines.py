"""JSON lines, in blocks of bytes: a document belongs to the block that its line begins in."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stoker.conf.targets import import_target
from stoker.data.remote import Damaged, Loss, Report
from stoker.data.remote.shards import Shard, names_fingerprint
from stoker.data.remote.store import Store
from stoker.data.streaming.splits import ByteBlocks, Content

COMPRESSED = (".gz", ".zst")
# Bytes read beyond a block at first, so that its last line rarely takes a second request: a part of it, within limits.
_BEYOND_PART, _LEAST_BEYOND, _MOST_BEYOND = 16, 256, 64 << 10


@dataclass(frozen=True)
class Lines:
    """Units over `.jsonl` shards: blocks of bytes, or whole shards where they are compressed.

    A document is the text at `column` of a line's object, or the token ids if it is a list of whole numbers.
    """

    blocks: ByteBlocks
    column: str
    map: str | None = None  # import path of a user's function of the object, instead of `column`

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {
            "format": "jsonl",
            "shards": names_fingerprint(self.blocks.shards),
            "split_bytes": self.blocks.block,
            "column": self.column,
            "map": self.map,
        }

    def __len__(self) -> int:
        return len(self.blocks)

    def read(self, split: int, store: Store, report: Report) -> Iterator[tuple[int, Content]]:
        shard, begin, end = self.blocks.locate(split)
        if shard.name.endswith(COMPRESSED):
            lines = _lines(_decompressed(shard, store.read(shard, begin, end)), 0)
        else:
            lines = _lines_that_begin(shard, begin, end, store)
        number = 0
        for byte, line in lines:
            if not line.strip():
                continue
            try:
                content = self._document(shard, byte, line, number)
            except Damaged as error:
                report(Loss(error, number, 1))
            else:
                if content is not None:
                    yield number, content
            number += 1

    def _document(self, shard: Shard, byte: int, line: bytes, number: int) -> Content | None:
        where = (shard.url, byte, f"line {number} of its split")
        try:
            values = json.loads(line)
        except UnicodeDecodeError as error:
            raise Damaged(f"not UTF-8: byte {line[error.start]:#04x} at offset {error.start} of it", *where) from error
        except (ValueError, RecursionError) as error:
            raise Damaged(f"not JSON: {error}", *where) from error
        if self.map is not None:
            found = import_target(self.map)(values)
            return None if found is None else content_of(found, self.map, where)
        if not isinstance(values, dict) or self.column not in values:
            names = f"it has {', '.join(values)}" if isinstance(values, dict) else "it is no object"
            raise Damaged(f"no column {self.column!r}: {names}", *where)
        return content_of(values[self.column], self.column, where)


def content_of(value: Any, column: str, where: tuple[str, int | None, str | None]) -> Content:
    """A column's value as a document. `where`: URL, byte and sample, for the Damaged that it raises otherwise."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell and UTF-8 cannot
            raise Damaged(f"not valid Unicode: {error}", *where) from error
        return value
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, bytes):
        ids = np.asarray(value)
        if ids.ndim == 1 and (ids.dtype.kind in "iu" or not len(ids)):
            return ids.astype(np.int64)
    raise Damaged(f"column {column!r} is {type(value).__name__}, neither text nor token ids", *where)


def _lines_that_begin(shard: Shard, begin: int, end: int, store: Store) -> Iterator[tuple[int, bytes]]:
    """(byte, line) of the lines that begin in `begin` to `end`."""
    beyond = min(max((end - begin) // _BEYOND_PART, _LEAST_BEYOND), _MOST_BEYOND)
    data = store.read(shard, max(0, begin - 1), end + beyond)
    first = 0
    if begin:  # the byte before says whether a line begins with the block
        line_end = data.find(b"\n", 0, end - begin)
        if line_end < 0:
            return
        first = line_end + 1
    base = max(0, begin - 1)
    last = data.find(b"\n", end - 1 - base)  # the end of the last line that begins before `end`
    read_to, step = base + len(data), 2 * beyond
    pieces = [data]
    while last < 0 and read_to < shard.size:
        pieces.append(store.read(shard, read_to, read_to + step))
        place = pieces[-1].find(b"\n")
        last = place if place < 0 else read_to - base + place
        read_to, step = read_to + len(pieces[-1]), 2 * step
    data = b"".join(pieces)
    yield from _lines(memoryview(data)[first : len(data) if last < 0 else last].tobytes(), base + first)


def _lines(data: bytes, byte: int) -> Iterator[tuple[int, bytes]]:
    for line in data.split(b"\n"):
        yield byte, line
        byte += len(line) + 1


def _decompressed(shard: Shard, data: bytes) -> bytes:
    try:
        return gzip.decompress(data) if shard.name.endswith(".gz") else _unzstd(data)
    except ImportError as error:
        raise ValueError(f"{shard.url}: reading .zst takes the package zstandard: pip install zstandard") from error
    except (EOFError, OSError, zlib.error) as error:
        raise Damaged(f"it cannot be decompressed: {error}", shard.url) from error


def _unzstd(data: bytes) -> bytes:
    import zstandard

    pieces = []
    while data:  # frame after frame
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            pieces.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        if not frame.eof:
            raise EOFError("its last frame is cut short")
        data = frame.unused_data
    return b"".join(pieces)
