"""From a config to the splits of a source: its shards, their contents, and their reader."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from stoker.conf.schema import DataConfig
from stoker.data.cache import cache_root
from stoker.data.decompress import limits_of
from stoker.data.formats import TEXT, Format, Kind, identify, refuse
from stoker.data.jsonl import READS as JSON
from stoker.data.remote.blocks import BlockCache
from stoker.data.remote.contents import content_of
from stoker.data.remote.lookup import look_up
from stoker.data.remote.retries import Patience
from stoker.data.remote.shards import Shard, addresses
from stoker.data.remote.store import Store
from stoker.data.streaming.files import Files, group
from stoker.data.streaming.lines import Lines, can_be_cut
from stoker.data.streaming.splits import ByteBlocks, Splits
from stoker.data.streaming.table_splits import open_tables
from stoker.data.text import READS as TEXT_READS
from stoker.data.text import files_of, known_args

_WINDOWS_PER_STREAM = 16  # windows of each stream in an epoch, at least, as far as the smallest split allows
_UNIT_BYTES = (4 << 10, 1 << 20)  # least and most when data.split_bytes is null
_AT_ONCE = 32  # shards opened at the same time


def open_text(config: DataConfig) -> Splits:
    """`data=text`: the files below `data.path` or named by `data.urls`; with the formats of indexed texts.

    Raises ValueError when there are none, and when they are of several formats.
    """
    args = known_args(config, f"data={config.name}", pattern="*", text="text", format="auto")
    return open_shards(config, args["pattern"], TEXT_READS, args["format"], args["text"], None)


def open_shards(
    config: DataConfig, pattern: str, reads: Sequence[Format], given: str, column: str, map: str | None
) -> Splits:
    """The shards of `data.urls` or below `data.path` as splits: texts, JSON or tables, of which none mixes with
    another.

    `given` is data.args.format. Raises ValueError for shards of a format that is not among `reads`.
    """
    shards, names = shards_of(config, pattern)
    limits, store = limits_of(config), Store(patience_of(config))

    def look(shard: Shard) -> Kind:
        name = shard.url.partition("?")[0]
        kind = identify(name, lambda size: store.read(shard, 0, size), limits, given, column if map is None else None)
        refuse(shard.url, kind, f"data={config.name}", reads)
        return kind

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        kinds = list(pool.map(look, shards))
    kept = [number for number, shard in enumerate(shards) if shard.size]
    if not kept:
        raise ValueError(f"data.path={config.path} holds no text in files that match data.args.pattern={pattern}")
    shards, names, kinds = [shards[n] for n in kept], [names[n] for n in kept], [kinds[n] for n in kept]
    for name, kind in zip(names, kinds, strict=True):
        if _reader(kind) != _reader(kinds[0]):
            raise ValueError(
                f"data={config.name} holds {kinds[0]} and {kind}, such as {names[0]} and {name}: pick one kind with "
                "data.args.pattern"
            )
    content = content_of(shards, store, cache_root(config))
    if _reader(kinds[0]) == "text":
        return Files(
            shards,
            names,
            kinds,
            group([shard.size for shard in shards], bytes_of_split(config, shards)),
            content,
            limits,
        )
    if _reader(kinds[0]) != "json":
        return open_tables(shards, kinds[0], limits, open_store(config), column, map, content)
    whole = [not can_be_cut(kind) for kind in kinds]
    blocks = ByteBlocks(shards, bytes_of_split(config, shards), whole)
    by_url = {shard.url: kind for shard, kind in zip(shards, kinds, strict=True)}
    return Lines(blocks, by_url, column, limits, map, content)


def _reader(kind: Kind) -> str:
    """The reader of such a shard: shards that mix in a source have the same."""
    if kind.format in JSON:
        return "json"
    compression = f" {kind.compression.name}" if kind.compression is not None and kind.format is not TEXT else ""
    return f"{kind.format.name}{compression}"


def streamed_only(config: DataConfig) -> NoReturn:
    """The `data.target` of sources that only data.mode=streaming reads. Raises ValueError."""
    if config.mode == "streaming":
        raise ValueError(
            f"data={config.name} is tokenised as training reads it, so there is nothing to make of it in advance: "
            "stoker train reads it as it is, and stoker data verify counts its documents"
        )
    raise ValueError(f"data={config.name} can only be streamed: set data.mode=streaming")


def bytes_of_split(config: DataConfig, shards: Sequence[Shard]) -> int:
    """`data.split_bytes`, or a size that gives enough windows of these shards for all streams."""
    if config.split_bytes is not None:
        return config.split_bytes
    least, most = _UNIT_BYTES
    total = sum(shard.size for shard in shards)
    return max(least, min(most, total // (config.streams * config.shuffle_window * _WINDOWS_PER_STREAM)))


def shards_of(config: DataConfig, pattern: str) -> tuple[list[Shard], list[str]]:
    """The shards of `data.urls` or below `data.path` in a fixed order, and their names."""
    if config.urls:
        shards = look_up(addresses(config.urls), patience_of(config))
        return shards, [shard.name for shard in shards]
    found = files_of(config, f"data={config.name}", pattern)
    return look_up([str(path) for _, path in found]), [name for name, _ in found]


def patience_of(config: DataConfig) -> Patience:
    """The retries for reading from servers."""
    return Patience(retries=config.retries, stall_seconds=config.stall_seconds)


def open_store(config: DataConfig) -> Store:
    """The reader of the shards of `config`."""
    cache = None
    if config.block_cache is not None:
        cache = BlockCache(Path(config.block_cache).expanduser(), int(config.block_cache_gib * 2**30))
    return Store(patience_of(config), cache)
