"""Tables in files: parquet row groups and arrow record batches, read with pyarrow, and whole files of separated values.

Parquet and arrow keep the positions of their pieces at their end, so a piece is found without reading those before it;
arrow streams are scanned when they are opened (arrow.py). A file of separated values is one piece, because only
reading it from its beginning shows which line ends are inside a value.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from stoker.data.decompress import Limits, PiecesFile, TooLarge, decompressed
from stoker.data.documents import Collection, stamp
from stoker.data.formats import CSV, PARQUET, TSV, Kind
from stoker.data.remote import Damaged
from stoker.data.remote.shards import Shard
from stoker.data.remote.store import Store
from stoker.data.streaming.arrow import Batches, batches, is_stream

_BLOCK = 1 << 20  # bytes of a file of separated values read at a time
_ROWS = 1024  # of a row group decoded at a time
Batch = Iterator[Mapping[str, Any]]


class Table(Protocol):
    """An opened table. `len`: how many pieces it has."""

    batches: Batches | None  # of an arrow stream: positions of its batches

    def __len__(self) -> int: ...

    def rows(self, piece: int, columns: list[str] | None) -> Batch:
        """The rows of a piece in order, with only `columns` if they are given. Raises Damaged without one of them."""
        ...


def open_table(kind: Kind, shard: Shard, store: Store, limits: Limits, known: Batches | None = None) -> Table:
    """Open a table to read it in pieces. `known`: the batches of an arrow stream that was opened before.

    Raises Damaged for anything else.
    """
    import pyarrow

    try:
        if kind.format in (CSV, TSV):
            return _Separated(kind, shard, store, limits)
        if kind.compression is not None:
            problem = f"it is compressed by {kind.compression.name}, and {kind.format.words} is read in pieces"
            raise ValueError(f"{problem}: decompress it ({kind.compression.command})")
        if kind.format is PARQUET:
            return _Parquet(shard, store, limits)
        if known is not None or is_stream(shard, store):
            return _ArrowStream(shard, store, known)
        return _Arrow(shard, store)
    except Damaged:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Damaged(f"it is no {kind.format.name} file: {error}", shard.url) from error


def read_piece(
    kind: Kind,
    shard: Shard,
    store: Store,
    limits: Limits,
    piece: int,
    columns: list[str] | None,
    known: Batches | None = None,
) -> Batch:
    """The rows of a piece of a shard. Raises Damaged for an unreadable one and TooLarge for one beyond the limits."""
    import pyarrow

    try:
        yield from open_table(kind, shard, store, limits, known).rows(piece, columns)
    except (pyarrow.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise Damaged(f"it cannot be read: {error}", shard.url, None, f"piece {piece}") from error


def table_collections(name: str, path: Path, kind: Kind, column: str, limits: Limits) -> list[Collection]:
    """The rows of a table in a file as documents, a collection for each piece: the text at `column` of each row.

    Raises ValueError for anything but a table. Reading raises ValueError, naming file and row, for a value that is not
    text.
    """
    version, size = stamp(path)
    shard, store = Shard(str(path), size), Store()
    opened = open_table(kind, shard, store, limits)
    found = []
    for piece in range(len(opened)):
        read = partial(_texts, kind, shard, store, limits, piece, column, opened.batches)
        part = None if version is None else f"{version} {kind} {column} {piece}"
        found.append(Collection(name, read, part, size // len(opened)))
    return found


def _texts(
    kind: Kind, shard: Shard, store: Store, limits: Limits, piece: int, column: str, known: Batches | None
) -> Iterator[tuple[str, str]]:
    try:
        for number, row in enumerate(read_piece(kind, shard, store, limits, piece, [column], known)):
            value = row[column]
            where = f"{shard.url} (row {number} of piece {piece})"
            if not isinstance(value, str):
                raise ValueError(f"{where}: its {column!r} is {type(value).__name__}, not str")
            yield where, value
    except TooLarge as error:
        raise ValueError(f"cannot read {shard.url}: {error}") from error


class _Parquet:
    batches: Batches | None = None

    def __init__(self, shard: Shard, store: Store, limits: Limits) -> None:
        import pyarrow.parquet

        self._limits = limits
        self._file = pyarrow.parquet.ParquetFile(
            RangeFile(shard, store), pre_buffer=True, page_checksum_verification=True
        )
        self._url = shard.url

    def __len__(self) -> int:
        return self._file.num_row_groups

    def rows(self, piece: int, columns: list[str] | None) -> Batch:
        _check_columns(self._file.schema_arrow.names, columns, self._url)
        if self._file.metadata.row_group(piece).total_byte_size > self._limits.held_bytes:
            raise self._limits.too_large(f"row group {piece} of {self._url}")
        held = 0  # a value that a dictionary holds once takes its room in every row
        for batch in self._file.iter_batches(_ROWS, row_groups=[piece], columns=columns):
            held += batch.nbytes
            if held > self._limits.held_bytes:
                raise self._limits.too_large(f"row group {piece} of {self._url}")
            yield from batch.to_pylist()


class _Arrow:
    batches: Batches | None = None

    def __init__(self, shard: Shard, store: Store) -> None:
        import pyarrow

        self._file = pyarrow.ipc.open_file(RangeFile(shard, store))
        self._url = shard.url

    def __len__(self) -> int:
        return self._file.num_record_batches

    def rows(self, piece: int, columns: list[str] | None) -> Batch:
        _check_columns(self._file.schema.names, columns, self._url)
        batch = self._file.get_batch(piece)
        batch.validate(full=True)
        yield from (batch if columns is None else batch.select(columns)).to_pylist()


class _ArrowStream:
    def __init__(self, shard: Shard, store: Store, known: Batches | None) -> None:
        self._shard, self._store = shard, store
        self.batches: Batches | None = batches(shard, store) if known is None else known

    def __len__(self) -> int:
        return len(self.batches or ())

    def rows(self, piece: int, columns: list[str] | None) -> Batch:
        import pyarrow

        assert self.batches is not None
        needed = self.batches[piece]
        with pyarrow.ipc.open_stream(b"".join(self._store.read(self._shard, m.begin, m.end) for m in needed)) as reader:
            _check_columns(reader.schema.names, columns, self._shard.url)
            batch = reader.read_next_batch()
        batch.validate(full=True)
        yield from (batch if columns is None else batch.select(columns)).to_pylist()


class _Separated:
    """Comma- or tab-separated values with a header (RFC 4180): every value is text, and every row has all of them.

    pyarrow's reader extends the value of an unclosed quote to the end of the file, and drops some
    quotes inside others. The `csv` module refuses both.
    """

    batches: Batches | None = None

    def __init__(self, kind: Kind, shard: Shard, store: Store, limits: Limits) -> None:
        self._kind, self._shard, self._store, self._limits = kind, shard, store, limits

    def __len__(self) -> int:
        return 1

    def rows(self, piece: int, columns: list[str] | None) -> Batch:
        csv.field_size_limit(self._limits.held_bytes)
        pieces = decompressed(shard_pieces(self._shard, self._store), self._kind.compression, self._limits)
        text = io.TextIOWrapper(io.BufferedReader(PiecesFile(pieces)), encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter="\t" if self._kind.format is TSV else ",", strict=True)
        try:
            names = next(reader, [])
            if twice := {name for name in names if names.count(name) > 1}:
                raise self._damaged(reader, f"its header holds {', '.join(sorted(map(repr, twice)))} twice")
            _check_columns(names, columns, self._shard.url)
            for values in reader:
                if len(values) != len(names) and values:  # a blank line is none
                    raise self._damaged(reader, f"{len(values)} values, and the header names {len(names)}")
                if values:
                    yield dict(zip(names, values, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise self._damaged(reader, str(error)) from error

    def _damaged(self, reader: Any, problem: str) -> Damaged:
        return Damaged(problem, self._shard.url, None, f"line {reader.line_num}")


def shard_pieces(shard: Shard, store: Store) -> Iterator[bytes]:
    """The bytes of a shard in blocks."""
    for begin in range(0, shard.size, _BLOCK):
        yield store.read(shard, begin, min(begin + _BLOCK, shard.size))


def _check_columns(names: Sequence[str], columns: list[str] | None, url: str) -> None:
    missing = [name for name in columns or () if name not in names]
    if missing:
        raise Damaged(f"no column {missing[0]!r}: it has {', '.join(names)}", url)


class RangeFile(io.RawIOBase):
    """A shard as the file that pyarrow reads: every read is a range of a `Store`."""

    def __init__(self, shard: Shard, store: Store) -> None:
        super().__init__()
        self._shard, self._store, self._at = shard, store, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._shard.size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._shard.size if size < 0 else self._at + size
        found = self._store.read(self._shard, self._at, end)
        self._at += len(found)
        return found
