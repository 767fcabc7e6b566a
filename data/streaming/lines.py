"""JSON lines, in blocks of bytes: a document belongs to the block in which its line begins.

Compressed lines and JSON arrays cannot be split: a block is a whole shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stoker.conf.targets import import_target
from stoker.data import decompress
from stoker.data.decompress import Limits, TooLarge, decompressed
from stoker.data.formats import JSON_ARRAY, JSON_LINES, Kind
from stoker.data.json_text import elements, parse
from stoker.data.keys import SplitsKey
from stoker.data.remote import Damaged, Leftover, Loss, Report
from stoker.data.remote.shards import Shard, names_fingerprint
from stoker.data.remote.store import Store
from stoker.data.streaming.splits import ByteBlocks, Content
from stoker.data.table_files import shard_pieces

# Bytes read beyond a block at first, so that its last line rarely takes a second request: a part of it, within limits.
_BEYOND_PART, _LEAST_BEYOND, _MOST_BEYOND = 16, 256, 64 << 10


def can_be_cut(kind: Kind) -> bool:
    """Whether a part of such a shard can be read separately."""
    return kind.format is JSON_LINES and kind.compression is None


@dataclass(frozen=True)
class Lines:
    """Splits over shards of JSON lines or JSON arrays: blocks of bytes, or whole shards where they cannot be cut.

    A document is the text at `column` of an object, or the token ids if it is a list of whole numbers.
    """

    blocks: ByteBlocks
    kinds: Mapping[str, Kind]  # by URL
    column: str
    limits: Limits
    map: str | None = None  # import path of a user's function of the object, instead of `column`
    content: str | None = None

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        reading = (("split_bytes", self.blocks.block), ("column", self.column), ("map", self.map))
        return SplitsKey("jsonl", names_fingerprint(self.blocks.shards), self.content, reading).values()

    def __len__(self) -> int:
        return len(self.blocks)

    def read(self, split: int, store: Store, report: Report) -> Iterator[tuple[int, Content]]:
        shard, begin, end = self.blocks.locate(split)
        number = 0
        for byte, value in self._values(shard, begin, end, store):
            if isinstance(value, bytes) and not value.strip():
                continue
            try:
                content = self._document(shard, byte, value, number)
            except Damaged as error:
                report(Loss(error, number, 1))
            else:
                if content is None:
                    report(Leftover(shard.url, byte or 0, f"line {number} of its split", f"left out by {self.map}"))
                else:
                    yield number, content
            number += 1

    def _values(self, shard: Shard, begin: int, end: int, store: Store) -> Iterator[tuple[int | None, Any]]:
        """The place and the bytes of each line of a block, or the elements of an array."""
        kind = self.kinds[shard.url]
        if can_be_cut(kind):
            yield from _lines_that_begin(shard, begin, end, store)
            return
        pieces = decompressed(shard_pieces(shard, store), kind.compression, self.limits)
        try:
            if kind.format is JSON_ARRAY:
                found = elements(decompress.whole(pieces, self.limits), (self.column,))
                yield from ((None, value) for value in found)
                return
            byte = 0
            for line in decompress.lines(pieces, self.limits):
                yield byte, line
                byte += len(line) + 1
        except TooLarge as error:
            raise TooLarge(f"cannot read {shard.url}: {error}") from error
        except Damaged:
            raise
        except (OSError, EOFError, ValueError) as error:
            raise Damaged(f"it cannot be read: {error}", shard.url) from error

    def _document(self, shard: Shard, byte: int | None, value: Any, number: int) -> Content | None:
        where = (shard.url, byte, f"line {number} of its split" if isinstance(value, bytes) else f"element {number}")
        if isinstance(value, bytes):
            try:
                value = parse(value, (self.column,) if self.map is None else ())
            except ValueError as error:
                raise Damaged(str(error), *where) from error
        if self.map is not None:
            found = import_target(self.map)(value)
            return None if found is None else content_of(found, self.map, where)
        if not isinstance(value, dict) or self.column not in value:
            names = f"it has {', '.join(value)}" if isinstance(value, dict) else "it is no object"
            raise Damaged(f"no column {self.column!r}: {names}", *where)
        return content_of(value[self.column], self.column, where)


def content_of(value: Any, column: str, where: tuple[str, int | None, str | None]) -> Content:
    """A column's value as a document. `where`: URL, byte and sample, for the Damaged that it raises otherwise."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:  # an unpaired surrogate, which JSON can express and UTF-8 cannot
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
    if begin:  # the byte before shows whether a line begins with the block
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
