"""Positions of the record batches in an arrow stream, from the heads of its messages.

An arrow file ends with a list of its batches; a stream (what `datasets` keeps in its cache) has none. But each of its
messages begins with the size of its head, which holds the size of its body (Arrow columnar format, "Encapsulated
message format"). So a stream is scanned by its heads only, and a batch is read with its prerequisites:
the schema and the dictionaries.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from stoker.data.remote.shards import Shard
from stoker.data.remote.store import Store

_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # kinds of messages (Message.fbs, MessageHeader)
_CONTINUES = b"\xff\xff\xff\xff"
_PREFIX = 8  # bytes before a head: the mark above and its size
_HEAD = 4 << 10  # bytes per request: most heads are smaller
_BODY_SIZE = 3  # place of Message.bodyLength among the table's fields


@dataclass(frozen=True)
class Message:
    """A message of a stream: bytes `begin` to `end`."""

    kind: int
    begin: int
    end: int


Batches = list[list[Message]]  # for each record batch, the messages that make a stream of only this batch


def is_stream(shard: Shard, store: Store) -> bool:
    """Whether an arrow shard is a stream and no file, which begins with its magic number."""
    return store.read(shard, 0, 4) == _CONTINUES


def messages(shard: Shard, store: Store) -> Iterator[Message]:
    """The messages of a stream in order.

    Raises ValueError where the stream continues without a message, for a stream without its end mark, which is cut
    short, and for bytes after it, such as a second stream.
    """
    at = 0
    while at < shard.size:
        head = store.read(shard, at, at + _HEAD)
        if len(head) < _PREFIX or head[:4] != _CONTINUES:
            raise ValueError(f"no message at byte {at} of an arrow stream")
        (size,) = struct.unpack_from("<i", head, 4)
        if size == 0:  # the end
            if at + _PREFIX != shard.size:
                raise ValueError(f"{shard.size - at - _PREFIX} bytes follow the end of the arrow stream at byte {at}")
            return
        if not 0 < size <= shard.size - at - _PREFIX:
            raise ValueError(f"the message at byte {at} of an arrow stream is cut short")
        if len(head) < _PREFIX + size:
            head = store.read(shard, at, at + _PREFIX + size)
        kind, body = _kind_and_body(head[_PREFIX : _PREFIX + size], at)
        end = at + _PREFIX + size + body
        if body < 0 or end > shard.size:
            raise ValueError(f"the message at byte {at} of an arrow stream is cut short")
        yield Message(kind, at, end)
        at = end
    raise ValueError("an arrow stream without its end mark: it is cut short")


def batches(shard: Shard, store: Store) -> Batches:
    """The record batches of a stream. Raises ValueError for anything else."""
    before: list[Message] = []
    found = []
    for message in messages(shard, store):
        if message.kind == _BATCH:
            found.append([*before, message])
        elif message.kind in (_SCHEMA, _DICTIONARY):
            before.append(message)
    if not before:
        raise ValueError("an arrow stream without a schema")
    return found


def _kind_and_body(head: bytes, at: int) -> tuple[int, int]:
    """The kind of a message and the bytes of its body: two fields of a flatbuffer's table."""
    try:
        (table,) = struct.unpack_from("<I", head, 0)
        fields = table - struct.unpack_from("<i", head, table)[0]
        (size,) = struct.unpack_from("<H", head, fields)

        def place(number: int) -> int:
            entry = 4 + 2 * number
            return struct.unpack_from("<H", head, fields + entry)[0] if entry < size else 0

        kind, body = place(1), place(_BODY_SIZE)
        return head[table + kind] if kind else 0, struct.unpack_from("<q", head, table + body)[0] if body else 0
    except (struct.error, IndexError) as error:
        raise ValueError(f"a garbled message at byte {at} of an arrow stream") from error
