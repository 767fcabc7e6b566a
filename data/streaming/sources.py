"""From a config to the splits of a source: which shards there are, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from stoker.conf.schema import DataConfig
from stoker.data.remote.blocks import BlockCache
from stoker.data.remote.lookup import look_up
from stoker.data.remote.retries import Patience
from stoker.data.remote.shards import Shard, addresses
from stoker.data.remote.store import Store
from stoker.data.streaming.files import Files, group
from stoker.data.streaming.lines import COMPRESSED, Lines
from stoker.data.streaming.splits import ByteBlocks, Splits
from stoker.data.text import files_of, known_args

_WINDOWS_PER_STREAM = 16  # windows of each stream in an epoch, at least, as far as the smallest split allows
_UNIT_BYTES = (4 << 10, 1 << 20)  # least and most that is chosen when data.split_bytes is not given
ENDINGS_OF_LINES = (".jsonl", *(f".jsonl{ending}" for ending in COMPRESSED))


def open_text(config: DataConfig) -> Splits:
    """`data=text`: the files below `data.path` or named by `data.urls`, as JSON lines if they are called so.

    Raises ValueError when there are none, or when they are of both kinds.
    """
    args = known_args(config, f"data={config.name}", pattern="*", text="text")
    shards, names = shards_of(config, args["pattern"])
    lines = [name.endswith(ENDINGS_OF_LINES) for name in names]
    if any(lines) and not all(lines):
        odd = names[lines.index(not lines[0])]
        raise ValueError(
            f"data={config.name} holds JSON lines and other texts, such as {names[0]} and {odd}: pick one kind with "
            f"data.args.pattern"
        )
    if not any(lines):
        split_bytes = bytes_of_split(config, shards)
        return Files(shards, names, group([shard.size for shard in shards], split_bytes))
    return open_lines(config, shards, names, args["text"])


def open_lines(
    config: DataConfig, shards: Sequence[Shard], names: Sequence[str], column: str, map: str | None = None
) -> Splits:
    """Shards of JSON lines, all compressed or all plain, which is a ValueError otherwise."""
    packed = [name.endswith(COMPRESSED) for name in names]
    if any(packed) and not all(packed):
        raise ValueError(f"data={config.name} holds compressed and plain JSON lines: pick one with data.args.pattern")
    return Lines(ByteBlocks(shards, None if any(packed) else bytes_of_split(config, shards)), column, map)


def streamed_only(config: DataConfig) -> NoReturn:
    """The `data.target` of sources that only data.mode=streaming reads. Raises ValueError."""
    raise ValueError(f"data={config.name} is read as it is needed: say data.mode=streaming")


def bytes_of_split(config: DataConfig, shards: Sequence[Shard]) -> int:
    """`data.split_bytes`, or what makes enough windows of these shards for all streams."""
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
    shards = look_up([str(path) for _, path in found])
    kept = [(shard, name) for shard, (name, _) in zip(shards, found, strict=True) if shard.size]
    if not kept:
        raise ValueError(f"data.path={config.path} holds no text in files that match data.args.pattern={pattern}")
    return [shard for shard, _ in kept], [name for _, name in kept]


def patience_of(config: DataConfig) -> Patience:
    """How long to try to read from servers."""
    return Patience(retries=config.retries, stall_seconds=config.stall_seconds)


def open_store(config: DataConfig) -> Store:
    """What reads the shards of `config`."""
    cache = None
    if config.block_cache is not None:
        cache = BlockCache(Path(config.block_cache).expanduser(), int(config.block_cache_gib * 2**30))
    return Store(patience_of(config), cache)
