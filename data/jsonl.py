"""Files of JSON lines or a JSON array, plain or compressed, as collections of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stoker.data.decompress import Limits, TooLarge, decompressed, lines, whole
from stoker.data.documents import Collection, stamp
from stoker.data.formats import JSON_ARRAY, JSON_LINES, Kind
from stoker.data.json_text import elements, parse

READS = (JSON_LINES, JSON_ARRAY)
_RANGE_BYTES = 64 << 20  # of a plain file, read as one collection: so several processes share a large file
_BLOCK = 1 << 20  # bytes of a file read at a time
_COMPRESSION = 4  # bytes of text for a compressed one, about


def json_collections(
    name: str,
    path: Path,
    kind: Kind,
    limits: Limits,
    keys: Sequence[str],
    text_of: Callable[[dict[str, Any]], str],
    what: str,
) -> list[Collection]:
    """The objects of a file, `text_of` each, in collections of some size. Blank lines are no texts.

    `keys` are those that `text_of` reads, which no object may hold twice. `what` describes the result of `text_of`:
    other texts of the same file are another version. Reading raises ValueError, naming file and line, for invalid JSON
    and for objects that `text_of` refuses by ValueError.
    """
    version, size = stamp(path)
    version = None if version is None else f"{version} {kind} {what}"
    if kind.format is JSON_ARRAY or kind.compression is not None:
        read = _read_array if kind.format is JSON_ARRAY else _read_compressed
        size *= _COMPRESSION if kind.compression is not None else 1
        return [Collection(name, partial(read, path, kind, limits, keys, text_of), version, size)]
    found = []
    for begin in range(0, max(size, 1), _RANGE_BYTES):
        end = min(begin + _RANGE_BYTES, size)
        part = None if version is None else f"{version} {begin}-{end}"
        found.append(Collection(name, partial(_read_range, path, begin, end, keys, text_of), part, end - begin))
    return found


def field(key: str, kind: type) -> Callable[[dict[str, Any]], Any]:
    """A function that returns an object's `key`. It raises ValueError where that is missing or of another type."""

    def take(values: dict[str, Any]) -> Any:
        if key not in values:
            raise ValueError(f"it has no {key!r}, only {', '.join(map(repr, values)) or 'nothing'}")
        if not isinstance(values[key], kind):
            raise ValueError(f"its {key!r} is {type(values[key]).__name__}, not {kind.__name__}")
        return values[key]

    return take


def pieces_of(path: Path) -> Iterator[bytes]:
    """The bytes of a file, in blocks."""
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _read_range(path: Path, begin: int, end: int, keys: Sequence[str], text_of: Callable) -> Iterator[tuple[str, str]]:
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
                    yield where, _text(line, where, keys, text_of)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def _read_compressed(
    path: Path, kind: Kind, limits: Limits, keys: Sequence[str], text_of: Callable
) -> Iterator[tuple[str, str]]:
    number = 0
    try:
        for number, line in enumerate(lines(decompressed(pieces_of(path), kind.compression, limits), limits), 1):
            where = f"{path} (line {number})"
            if line.strip():
                yield where, _text(line, where, keys, text_of)
    except (OSError, EOFError, TooLarge) as error:
        raise ValueError(f"cannot read {path} after line {number}: {error}") from error


def _read_array(
    path: Path, kind: Kind, limits: Limits, keys: Sequence[str], text_of: Callable
) -> Iterator[tuple[str, str]]:
    try:
        found = elements(whole(decompressed(pieces_of(path), kind.compression, limits), limits), keys)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"cannot read {path} as a JSON array: {error}") from error
    for number, values in enumerate(found):
        where = f"{path} (element {number})"
        yield where, _text(values, where, keys, text_of)


def _text(line: Any, where: str, keys: Sequence[str], text_of: Callable) -> str:
    try:
        values = parse(line, keys) if isinstance(line, bytes) else line
        if not isinstance(values, dict):
            raise ValueError(f"it is {type(values).__name__}, not an object")
        return text_of(values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error
