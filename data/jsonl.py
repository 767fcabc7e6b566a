"""Files of JSON lines, plain or compressed, as collections of texts."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from stoker.data.documents import Collection, stamp

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")
_RANGE_BYTES = 64 << 20  # of a plain file, read as one collection: so several processes share a large file
_BLOCK = 1 << 20  # bytes of a compressed file read at a time
_COMPRESSION = 4  # bytes of text for a compressed one, about


def is_jsonl(path: Path) -> bool:
    """Whether the name says that there are JSON lines in it."""
    return path.name.endswith(SUFFIXES)


def jsonl_collections(name: str, path: Path, what: str, text_of: Callable[[dict[str, Any]], str]) -> list[Collection]:
    """The lines of a file, `text_of` each object, in collections of some size. Blank lines are no texts.

    `what` says what `text_of` takes: other texts of the same file are another version.
    Reading raises ValueError, naming file and line, for what is not JSON and for what `text_of` refuses by ValueError.
    """
    version, size = stamp(path)
    version = None if version is None else f"{version} {what}"
    if not path.name.endswith((".jsonl", ".ndjson")):
        return [Collection(name, partial(_read_all, path, text_of), version, size * _COMPRESSION)]
    found = []
    for begin in range(0, max(size, 1), _RANGE_BYTES):
        end = min(begin + _RANGE_BYTES, size)
        part = None if version is None else f"{version} {begin}-{end}"
        found.append(Collection(name, partial(_read_range, path, begin, end, text_of), part, end - begin))
    return found


def field(key: str, kind: type) -> Callable[[dict[str, Any]], Any]:
    """What takes `key` out of an object. It raises ValueError where that is missing or of another type."""

    def take(values: dict[str, Any]) -> Any:
        if key not in values:
            raise ValueError(f"it has no {key!r}, only {', '.join(map(repr, values)) or 'nothing'}")
        if not isinstance(values[key], kind):
            raise ValueError(f"its {key!r} is {type(values[key]).__name__}, not {kind.__name__}")
        return values[key]

    return take


def _read_range(path: Path, begin: int, end: int, text_of: Callable) -> Iterator[tuple[str, str]]:
    """The lines that begin in `begin <= byte < end`."""
    try:
        with open(path, "rb") as file:
            if begin:
                file.seek(begin - 1)
                file.readline()  # it began before, unless that byte ends a line
            at = file.tell()
            while at < end and (line := file.readline()):
                where = f"{path} (line at byte {at})"
                at += len(line)
                if line.strip():
                    yield where, _text(line, where, text_of)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def _read_all(path: Path, text_of: Callable) -> Iterator[tuple[str, str]]:
    import zstandard

    number = 0
    try:
        for number, line in enumerate(_gzip_lines(path) if path.suffix == ".gz" else _zstd_lines(path), 1):
            where = f"{path} (line {number})"
            if line.strip():
                yield where, _text(line, where, text_of)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"cannot read {path} after line {number}: {error}") from error


def _gzip_lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        yield from file


def _zstd_lines(path: Path) -> Iterator[bytes]:
    rest = b""
    for block in _zstd_blocks(path):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    """The contents of all frames. Raises EOFError for a last frame that is cut short: the library's reader does not."""
    import zstandard

    with open(path, "rb") as file:
        frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
        while block := file.read(_BLOCK):
            while block:
                begun = True
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
        if begun:
            raise EOFError("the file is cut short")


def _text(line: bytes, where: str, text_of: Callable) -> str:
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError(f"it is {type(values).__name__}, not an object")
        return text_of(values)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: byte {error.object[error.start]:#04x}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
