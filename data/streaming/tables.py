"""`data=hf`: parquet row groups, arrow record batches and JSON lines by range; and whatever `datasets` can stream.

Parquet and arrow keep at their end where their pieces lie, so a split is found without reading what is before it; arrow
streams are walked through when they are opened (arrow.py). They are read with pyarrow through a file whose bytes come
from a `Store`; a name of the hub goes through `datasets`, whose `reshard()` cuts a dataset into the pieces that its
format has.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from stoker.conf.schema import DataConfig
from stoker.conf.targets import import_target
from stoker.data.remote import Damaged, Loss, Report
from stoker.data.remote.shards import Shard, names_fingerprint
from stoker.data.remote.store import Store
from stoker.data.streaming.arrow import Batches, batches, is_stream
from stoker.data.streaming.lines import content_of
from stoker.data.streaming.sources import ENDINGS_OF_LINES, open_lines, open_store, shards_of
from stoker.data.streaming.splits import Content, Splits
from stoker.data.text import known_args

_AT_ONCE = 32  # footers read at the same time


@dataclass(frozen=True)
class Tables:
    """Units over parquet shards (row groups) or arrow files (record batches). A document is a row's `column`, or what
    the user's function `map` makes of the row."""

    kind: str  # parquet | arrow
    shards: Sequence[Shard]
    firsts: np.ndarray  # int64 [shards + 1]: the number of the first split of each shard
    column: str
    map: str | None
    streams: Mapping[str, Batches]  # by URL: where the batches of arrow streams lie

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {
            "format": self.kind,
            "shards": names_fingerprint(self.shards),
            "column": self.column,
            "map": self.map,
        }

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def read(self, split: int, store: Store, report: Report) -> Iterator[tuple[int, Content]]:
        number = int(np.searchsorted(self.firsts, split, side="right")) - 1
        shard, piece = self.shards[number], split - int(self.firsts[number])
        columns = None if self.map else [self.column]
        rows = _read_piece(self.kind, shard, store, piece, columns, self.streams.get(shard.url))
        yield from documents_of_rows(rows, self.column, self.map, shard.url, piece, report)


@dataclass(frozen=True)
class Streamed:
    """Units over a `datasets.IterableDataset`, cut into as many pieces as its format has. It cannot be asked for bytes,
    so what is read through it is not counted, and damage is known by piece only."""

    dataset: Any
    name: str
    column: str
    map: str | None

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {"format": "datasets", "name": self.name, "column": self.column, "map": self.map}

    def __len__(self) -> int:
        return self.dataset.num_shards

    def read(self, split: int, store: Store, report: Report) -> Iterator[tuple[int, Content]]:
        def rows() -> Iterator[Mapping[str, Any]]:
            try:
                yield from self.dataset.shard(num_shards=len(self), index=split)
            except Exception as error:  # readers of formats have errors of their own
                raise Damaged(f"{type(error).__name__}: {error}", f"{self.name}, piece {split}") from error

        yield from documents_of_rows(rows(), self.column, self.map, self.name, split, report)


def documents_of_rows(
    rows: Iterator[Mapping[str, Any]], column: str, map: str | None, url: str, piece: int, report: Report
) -> Iterator[tuple[int, Content]]:
    """The documents of `rows`: the value at `column`, or what the function named by `map` makes of each."""
    function: Callable[[Mapping[str, Any]], Any] | None = None if map is None else import_target(map)
    for number, row in enumerate(rows):
        where = (url, None, f"row {number} of piece {piece}")
        try:
            if function is not None:
                value = function(row)
                if value is None:
                    continue
            elif column not in row:
                raise Damaged(f"no column {column!r}: it has {', '.join(row)}", *where)
            else:
                value = row[column]
            yield number, content_of(value, column if map is None else map, where)
        except Damaged as error:
            report(Loss(error, number, 1))


def open_hf(config: DataConfig) -> Splits:
    """`data=hf`: the shards of `data.urls` or below `data.path` (parquet, arrow, jsonl, jsonl.gz, jsonl.zst), or with
    `data.args.dataset` whatever `datasets.load_dataset` streams by that name.

    Raises ValueError when there are none, when they are of several formats, and for a column that is not there.
    """
    defaults: dict[str, Any] = {"pattern": "*", "column": "text", "map": None}
    hub: dict[str, Any] = {"dataset": None, "subset": None, "split": "train", "revision": None}
    args = known_args(config, "data=hf", **defaults, **hub)
    if args["dataset"] is not None:
        return _streamed(args)
    shards, names = shards_of(config, args["pattern"])
    endings = {name.rpartition(".")[2] for name in names}
    if all(name.endswith(ENDINGS_OF_LINES) for name in names):
        return open_lines(config, shards, names, args["column"], args["map"])
    if endings not in ({"parquet"}, {"arrow"}):
        raise ValueError(
            f"data=hf reads shards of one format, parquet, arrow or jsonl, not {', '.join(sorted(endings))}"
        )
    kind = endings.pop()
    store = open_store(config)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        opened = list(pool.map(partial(_open_to_use, kind, store=store), shards))
    firsts = np.concatenate([[0], np.cumsum([len(found) for found in opened], dtype=np.int64)])
    streams = {shard.url: found.batches for shard, found in zip(shards, opened, strict=True) if found.batches}
    return Tables(kind, shards, firsts, args["column"], args["map"], streams)


def _streamed(args: Mapping[str, Any]) -> Splits:
    import datasets

    try:
        dataset = datasets.load_dataset(
            args["dataset"], args["subset"], split=args["split"], revision=args["revision"], streaming=True
        ).reshard()
    except (OSError, ValueError) as error:
        raise ValueError(f"data.args.dataset={args['dataset']} cannot be opened: {error}") from error
    if args["map"] is None:
        dataset = dataset.select_columns([args["column"]])
    name = "/".join(str(args[key]) for key in ("dataset", "subset", "split", "revision") if args[key] is not None)
    return Streamed(dataset, name, args["column"], args["map"])


def _open_to_use(kind: str, shard: Shard, store: Store) -> _Parquet | _Arrow | _ArrowStream:
    try:
        return _open(kind, shard, store)
    except Damaged as error:
        raise ValueError(f"cannot use {error}") from error


def _read_piece(
    kind: str, shard: Shard, store: Store, piece: int, columns: list[str] | None, known: Batches | None
) -> Iterator[Mapping[str, Any]]:
    import pyarrow

    try:
        yield from _open(kind, shard, store, known).rows(piece, columns)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"it cannot be read: {error}", shard.url, None, f"piece {piece}") from error


def _open(kind: str, shard: Shard, store: Store, known: Batches | None = None) -> _Parquet | _Arrow | _ArrowStream:
    import pyarrow

    try:
        if kind == "parquet":
            return _Parquet(shard, store)
        if known is not None or is_stream(shard, store):
            return _ArrowStream(shard, store, known)
        return _Arrow(shard, store)
    except Damaged:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Damaged(f"it is no {kind} file: {error}", shard.url) from error


class _Parquet:
    batches: Batches | None = None

    def __init__(self, shard: Shard, store: Store) -> None:
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(
            RangeFile(shard, store), pre_buffer=True, page_checksum_verification=True
        )
        self._url = shard.url

    def __len__(self) -> int:
        return self._file.num_row_groups

    def rows(self, piece: int, columns: list[str] | None) -> Iterator[Mapping[str, Any]]:
        _check_columns(self._file.schema_arrow.names, columns, self._url)
        yield from self._file.read_row_group(piece, columns=columns).to_pylist()


class _Arrow:
    batches: Batches | None = None

    def __init__(self, shard: Shard, store: Store) -> None:
        import pyarrow

        self._file = pyarrow.ipc.open_file(RangeFile(shard, store))
        self._url = shard.url

    def __len__(self) -> int:
        return self._file.num_record_batches

    def rows(self, piece: int, columns: list[str] | None) -> Iterator[Mapping[str, Any]]:
        _check_columns(self._file.schema.names, columns, self._url)
        batch = self._file.get_batch(piece)
        batch.validate(full=True)
        yield from (batch if columns is None else batch.select(columns)).to_pylist()


class _ArrowStream:
    def __init__(self, shard: Shard, store: Store, known: Batches | None) -> None:
        self._shard, self._store = shard, store
        self.batches = batches(shard, store) if known is None else known

    def __len__(self) -> int:
        return len(self.batches)

    def rows(self, piece: int, columns: list[str] | None) -> Iterator[Mapping[str, Any]]:
        import pyarrow

        needed = self.batches[piece]
        with pyarrow.ipc.open_stream(b"".join(self._store.read(self._shard, m.begin, m.end) for m in needed)) as reader:
            _check_columns(reader.schema.names, columns, self._shard.url)
            batch = reader.read_next_batch()
        batch.validate(full=True)
        yield from (batch if columns is None else batch.select(columns)).to_pylist()


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
