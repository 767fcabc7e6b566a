"""A cache of downloaded blocks on disk, shared by all processes of a machine without any lock.

    <data.block_cache>/ab/<key>    a block and the CRC-32 of it

The key is a hash of the shard's URL, size and version and of the block's number, so a block never changes once it is
stored. It is written beside its place and renamed into it; two processes that fetch the same block write the same
bytes. When the cache has grown over its cap, the blocks used longest ago are removed. A block that is missing, cut
short or changed is fetched again.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from stoker.data.keys import BlockKey
from stoker.data.remote.shards import Shard

log = logging.getLogger(__name__)

BLOCK = 4 << 20  # bytes
_CHECK = 4  # bytes of the CRC-32 at a block's end
_LOOK_EVERY = 16  # blocks written by a process between two checks of the cache's size

Fetch = Callable[[Shard, int, int], bytes]


class BlockCache:
    """Blocks below `folder`, at most about `most_bytes` of them."""

    def __init__(self, folder: Path, most_bytes: int, block: int = BLOCK) -> None:
        self._folder, self._most, self._block = folder, most_bytes, block
        self._written = 0

    def read(self, shard: Shard, begin: int, end: int, fetch: Fetch) -> bytes:
        """Bytes `begin` to `end` of `shard`; blocks not in the cache come from `fetch`, in runs of whole blocks."""
        first, last = begin // self._block, (end - 1) // self._block
        found: dict[int, bytes] = {}
        for number in range(first, last + 1):
            held = self._load(shard, number)
            if held is not None:
                found[number] = held
        number = first
        while number <= last:
            if number in found:
                number += 1
                continue
            after = next((n for n in range(number, last + 1) if n in found), last + 1)
            data = fetch(shard, number * self._block, min(after * self._block, shard.size))
            for place in range(number, after):
                offset = (place - number) * self._block
                found[place] = data[offset : offset + self._block]
                self._keep(shard, place, found[place])
            number = after
        data = b"".join(found[number] for number in range(first, last + 1))
        return data[begin - first * self._block : end - first * self._block]

    def _path(self, shard: Shard, number: int) -> Path:
        key = BlockKey(shard.url, shard.size, shard.version, self._block, number).key
        return self._folder / key[:2] / key

    def _load(self, shard: Shard, number: int) -> bytes | None:
        path = self._path(shard, number)
        try:
            data = path.read_bytes()
            os.utime(path)  # used now
        except OSError:
            return None
        size = min(self._block, shard.size - number * self._block)
        body, check = data[:-_CHECK], data[-_CHECK:]
        if len(body) == size and zlib.crc32(body).to_bytes(_CHECK, "little") == check:
            return body
        log.warning("the cached block %s is damaged: fetched again", path)
        return None

    def _keep(self, shard: Shard, number: int, data: bytes) -> None:
        path = self._path(shard, number)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data + zlib.crc32(data).to_bytes(_CHECK, "little"))
            temporary.replace(path)
        except OSError as error:  # a cache that cannot be written costs only time
            log.info("%s not written: %s", path, error)
            with suppress(OSError):
                temporary.unlink()
        if self._written % _LOOK_EVERY == 0:
            self._shrink()
        self._written += 1

    def _shrink(self) -> None:
        """Remove the blocks used longest ago, down to nine tenths of the cap, if it is passed."""
        blocks = []
        for path in self._folder.glob("*/*"):
            with suppress(OSError):  # another process may have removed it
                status = path.stat()
                blocks.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in blocks)
        if total <= self._most:
            return
        for _, size, path in sorted(blocks):
            if total <= self._most * 9 // 10:
                return
            with suppress(OSError):
                path.unlink()
                total -= size
