"""`data=hf`: shards of parquet, arrow, JSON or separated values, and data sets that `datasets` can stream.

A name of the hub goes through `datasets`, whose `reshard()` splits a dataset into the pieces of its format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stoker.conf.schema import DataConfig
from stoker.data.cache import cache_root
from stoker.data.formats import TABLES
from stoker.data.jsonl import READS as JSON
from stoker.data.keys import SplitsKey, digest
from stoker.data.remote import Damaged, Report
from stoker.data.remote.contents import content_of
from stoker.data.remote.lookup import look_up
from stoker.data.remote.shards import scheme
from stoker.data.remote.store import Store
from stoker.data.streaming.sources import open_shards
from stoker.data.streaming.splits import Content, Splits
from stoker.data.streaming.table_splits import documents_of_rows
from stoker.data.text import known_args


@dataclass(frozen=True)
class Streamed:
    """Splits over a `datasets.IterableDataset`, cut into as many pieces as its format has.

    It gives no access to bytes, so bytes read through it are not counted, and damage is located by piece only.
    """

    dataset: Any
    name: str
    column: str
    map: str | None
    content: str | None  # of the files that it streams

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        reading = (("name", self.name), ("column", self.column), ("map", self.map))
        return SplitsKey("datasets", None, self.content, reading).values()

    def __len__(self) -> int:
        return self.dataset.num_shards

    def read(self, split: int, store: Store, report: Report) -> Iterator[tuple[int, Content]]:
        def rows() -> Iterator[Mapping[str, Any]]:
            try:
                yield from self.dataset.shard(num_shards=len(self), index=split)
            except Exception as error:  # readers of formats raise different errors
                raise Damaged(f"{type(error).__name__}: {error}", f"{self.name}, piece {split}") from error

        yield from documents_of_rows(rows(), self.column, self.map, self.name, split, report)


def open_hf(config: DataConfig) -> Splits:
    """`data=hf`: the shards of `data.urls` or below `data.path`, or with `data.args.dataset` the data set that
    `datasets.load_dataset` streams by that name.

    Raises ValueError when there are none, when they are of several formats, and for a column that does not exist.
    """
    defaults: dict[str, Any] = {"pattern": "*", "column": "text", "map": None, "format": "auto"}
    hub: dict[str, Any] = {"dataset": None, "subset": None, "split": "train", "revision": None}
    args = known_args(config, "data=hf", **defaults, **hub)
    if args["dataset"] is not None:
        return _streamed(config, args)
    return open_shards(config, args["pattern"], (*JSON, *TABLES), args["format"], args["column"], args["map"])


def _streamed(config: DataConfig, args: Mapping[str, Any]) -> Splits:
    import datasets

    try:
        builder = datasets.load_dataset_builder(args["dataset"], args["subset"], revision=args["revision"])
        dataset = builder.as_streaming_dataset(split=args["split"]).reshard()
        content = _content_of_files(builder.config.data_files or {}, args["split"], config)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.args.dataset={args['dataset']} cannot be opened: {error}") from error
    if args["map"] is None:
        dataset = dataset.select_columns([args["column"]])
    name = "/".join(str(args[key]) for key in ("dataset", "subset", "split", "revision") if args[key] is not None)
    return Streamed(dataset, name, args["column"], args["map"], content)


def _content_of_files(data_files: Mapping[str, Any], split: str, config: DataConfig) -> str | None:
    """The contents of a dataset's files: samples of local ones, commit or ETag of the hub's."""
    chosen = [data_files[split]] if split in data_files else list(data_files.values())
    names = [str(name) for files in chosen for name in files]
    if not names:
        return None
    if all(scheme(name) == "file" for name in names):
        return content_of(look_up(names), Store(), cache_root(config))
    return digest([list(map(str, origin)) for files in chosen for origin in files.origin_metadata])
