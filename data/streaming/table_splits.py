"""Parquet row groups, arrow record batches and files of separated values as splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from stoker.conf.targets import import_target
from stoker.data.decompress import Limits, TooLarge
from stoker.data.formats import Kind
from stoker.data.keys import SplitsKey
from stoker.data.remote import Damaged, Leftover, Loss, Report
from stoker.data.remote.shards import Shard, names_fingerprint
from stoker.data.remote.store import Store
from stoker.data.streaming.arrow import Batches
from stoker.data.streaming.lines import content_of
from stoker.data.streaming.splits import Content, Splits
from stoker.data.table_files import Table, open_table, read_piece

_AT_ONCE = 32  # footers read at the same time


@dataclass(frozen=True)
class Tables:
    """Splits over the pieces of tables (`stoker.data.table_files`).

    A document is a row's `column`, or the result of the user's function `map` for the row.
    """

    kind: Kind
    shards: Sequence[Shard]
    firsts: np.ndarray  # int64 [shards + 1]: the number of the first split of each shard
    column: str
    map: str | None
    streams: Mapping[str, Batches]  # by URL: positions of the batches of arrow streams
    limits: Limits
    content: str | None

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        reading = (("column", self.column), ("map", self.map))
        return SplitsKey(self.kind.format.name, names_fingerprint(self.shards), self.content, reading).values()

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def read(self, split: int, store: Store, report: Report) -> Iterator[tuple[int, Content]]:
        number = int(np.searchsorted(self.firsts, split, side="right")) - 1
        shard, piece = self.shards[number], split - int(self.firsts[number])
        columns = None if self.map else [self.column]
        rows = read_piece(self.kind, shard, store, self.limits, piece, columns, self.streams.get(shard.url))
        try:
            yield from documents_of_rows(rows, self.column, self.map, shard.url, piece, report)
        except TooLarge as error:
            raise TooLarge(f"cannot read {shard.url}: {error}") from error


def open_tables(
    shards: Sequence[Shard], kind: Kind, limits: Limits, store: Store, column: str, map: str | None, content: str | None
) -> Splits:
    """Shards of one kind as splits. Raises ValueError, naming it, for one that cannot be opened."""

    def opened(shard: Shard) -> Table:
        try:
            return open_table(kind, shard, store, limits)
        except Damaged as error:
            raise ValueError(f"cannot use {error}") from error

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(opened, shards))
    firsts = np.concatenate([[0], np.cumsum([len(table) for table in found], dtype=np.int64)])
    streams = {shard.url: table.batches for shard, table in zip(shards, found, strict=True) if table.batches}
    return Tables(kind, shards, firsts, column, map, streams, limits, content)


def documents_of_rows(
    rows: Iterator[Mapping[str, Any]], column: str, map: str | None, url: str, piece: int, report: Report
) -> Iterator[tuple[int, Content]]:
    """The documents of `rows`: the value at `column`, or the result of the function named by `map`."""
    function: Callable[[Mapping[str, Any]], Any] | None = None if map is None else import_target(map)
    for number, row in enumerate(rows):
        where = (url, None, f"row {number} of piece {piece}")
        try:
            if function is not None:
                value = function(row)
                if value is None:
                    report(Leftover(url, 0, f"row {number} of piece {piece}", f"left out by {map}"))
                    continue
            elif column not in row:
                raise Damaged(f"no column {column!r}: it has {', '.join(row)}", *where)
            else:
                value = row[column]
            yield number, content_of(value, column if map is None else map, where)
        except Damaged as error:
            report(Loss(error, number, 1))
