"""From a member of a sample to a document, decoded by webdataset according to its extension."""

from __future__ import annotations

import gzip
import io
from typing import Any

from webdataset.autodecode import Continue, Decoder, decoders

from stoker.data import npy
from stoker.data.remote import Damaged
from stoker.data.streaming.lines import content_of
from stoker.data.streaming.splits import Content
from stoker.data.streaming.tar import MOST_SAMPLE

_TEXTS, _JSON, _ARRAYS = {"txt", "text", "transcript"}, {"json", "jsn"}, {"npy"}


def refuse_member(member: str) -> None:
    """Raises ValueError for an extension of which webdataset makes no document."""
    if member != member.lower():
        raise ValueError(f"data.args.member={member}: webdataset lowers extensions: {member.lower()} finds it")
    kind = _kind(member)
    if kind in decoders and kind not in _TEXTS | _JSON | _ARRAYS:
        known = ", ".join(sorted(_TEXTS | _JSON | _ARRAYS))
        raise ValueError(
            f"data.args.member={member}: .{kind} is neither text nor token ids, and decoding some such members runs "
            f"code in them. Documents are .{known}, each also with .gz, and texts with extensions unknown to "
            f"webdataset; for others name a function of your own, from a sample to a document, as data.args.map"
        )


def document_of(member: str, data: bytes, json_key: str, where: tuple[str, int, str]) -> Content:
    """The contents of the member `member` of the sample at `where`: of JSON the string, or the value at `json_key`; of
    .npy token ids. Raises Damaged."""
    kind = _kind(member)
    try:
        value = _DECODER.decode1(member, data)
        if isinstance(value, bytes) and kind not in _JSON:
            value = value.decode()  # of an extension unknown to webdataset
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise Damaged(f"its .{member} is not UTF-8: {byte}", *where) from error
    except (ValueError, EOFError, OSError, RecursionError, MemoryError) as error:
        raise Damaged(f"its .{member} cannot be read: {error}", *where) from error
    if kind in _JSON:
        return _of_json(None if isinstance(value, bytes) else value, member, json_key, where)
    return content_of(value, f".{member}", where)


def _of_json(value: Any, member: str, json_key: str, where: tuple[str, int, str]) -> Content:
    if isinstance(value, dict):
        if json_key not in value:
            raise Damaged(f"its .{member} has no {json_key!r}: it has {', '.join(value)}", *where)
        value = value[json_key]
    return content_of(value, f".{member}", where)


def _kind(member: str) -> str:
    return member.removesuffix(".gz").rpartition(".")[2]


def _unzipped(key: str, data: bytes) -> Continue | None:
    """webdataset's gzfilter, with a limit."""
    if not key.endswith(".gz"):
        return None
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        found = file.read(MOST_SAMPLE + 1)
    if len(found) > MOST_SAMPLE:
        raise ValueError(f"more than {MOST_SAMPLE} bytes when it is decompressed")
    return Continue(key.removesuffix(".gz"), found)


def _whole_array(key: str, data: bytes) -> None:
    """Checks that webdataset lacks: it ignores bytes after an array, and allocates one before it checks its length."""
    if key.endswith(".npy"):
        npy.header(io.BytesIO(data), len(data))


_DECODER = Decoder([], pre=[_unzipped, _whole_array])
