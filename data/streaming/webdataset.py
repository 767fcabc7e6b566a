"""`data=webdataset`: splits of tar shards, in blocks of bytes: a sample belongs to the block that it begins in.

Where the samples of a shard begin is known from an index, which is built when the shard is first read (by reading all
of it) and kept: beside the shard as NAME.index, if it was made there, else below `data.cache`. Which samples belong to
which split follows from their places alone, so whether there was an index changes nothing but the bytes read.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from stoker.conf.schema import DataConfig
from stoker.conf.targets import import_target
from stoker.data.cache import cache_root
from stoker.data.remote import Damaged, Loss, Report
from stoker.data.remote.lookup import look_up
from stoker.data.remote.shards import Shard, addresses, local_path, names_fingerprint, scheme
from stoker.data.remote.store import Store
from stoker.data.streaming.lines import content_of
from stoker.data.streaming.sources import bytes_of_split, patience_of
from stoker.data.streaming.splits import ByteBlocks, Content, Splits
from stoker.data.streaming.tar import Broken, Index, Reader, Sample, build_index, dump, load, samples
from stoker.data.text import known_args

log = logging.getLogger(__name__)

Map = Callable[[dict[str, Any]], Content | None]  # a user's function: a sample -> a document, or None to leave it out

_CHUNK = 4 << 20  # bytes of one request while a shard is read through


@dataclass(frozen=True)
class TarShards:
    """Units over tar shards. A document is the member `member` of a sample: `.txt`, `.json` or `.npy`.

    Of `.json` it is the string, or the value at `json_key` of the object; of `.npy` the token ids.
    """

    blocks: ByteBlocks
    member: str
    json_key: str
    map: str | None
    indexes: Path  # folder

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {
            "format": "webdataset",
            "shards": names_fingerprint(self.blocks.shards),
            "split_bytes": self.blocks.block,
            "member": self.member,
            "json_key": self.json_key,
            "map": self.map,
        }

    def __len__(self) -> int:
        return len(self.blocks)

    def read(self, split: int, store: Store, report: Report) -> Iterator[tuple[int, Content]]:
        shard, begin, end = self.blocks.locate(split)
        if shard.size < 0:
            yield from self._read_through(shard, store, report)
            return
        index = self._index(shard, store)
        first, after = (bisect_left(index.samples, byte, key=attrgetter("begin")) for byte in (begin, end))
        here = index.samples[first:after]
        number = 0
        if here:
            data = io.BytesIO(store.read(shard, here[0].begin, here[-1].end))
            reader = Reader(data, here[0].begin, here[-1].end)
            try:
                for expected, (sample, contents) in zip(here, samples(reader), strict=True):
                    if sample != expected:
                        which = f"sample {sample.key}" if sample.key == expected.key else "other samples"
                        raise Broken(sample.begin, f"{which} than when its index was made: the checksums differ")
                    yield from self._document(shard, sample, contents, number, report)
                    number += 1
            except (Broken, ValueError) as error:
                if isinstance(error, Damaged):
                    raise
                near = here[min(number, len(here) - 1)]
                place = error.byte if isinstance(error, Broken) else near.begin
                raise Damaged(str(error), shard.url, place, near.key) from error
        if index.broken is not None and (index.broken[0] < end or end == shard.size):
            byte, reason = index.broken
            report(Loss(Damaged(reason, shard.url, byte, _after(index)), number, None))

    def _read_through(self, shard: Shard, store: Store, report: Report) -> Iterator[tuple[int, Content]]:
        """A shard that comes through a pipe."""
        number, first, last = 0, None, None
        with store.stream(shard) as stream:
            try:
                for sample, contents in samples(Reader(stream)):
                    if last is not None:
                        yield from self._document(shard, *last, number, report)
                        number += 1
                    first, last = first or sample, (sample, contents)
            except Broken as error:
                if last is not None and first is not None and len(last[0].extensions) == len(first.extensions):
                    yield from self._document(shard, *last, number, report)
                    number += 1
                raise Damaged(error.reason, shard.url, error.byte, last[0].key if last else None) from error
            while stream.read(_CHUNK):  # to the end of the command, which may fail yet
                pass
        if last is not None:
            yield from self._document(shard, *last, number, report)

    def _document(
        self, shard: Shard, sample: Sample, contents: dict[str, bytes], number: int, report: Report
    ) -> Iterator[tuple[int, Content]]:
        where = (shard.url, sample.begin, sample.key)
        try:
            if self.map is not None:
                found = import_target(self.map)({"__key__": sample.key, **contents})
                content = None if found is None else content_of(found, self.map, where)
            elif self.member not in contents:
                raise Damaged(f"no member .{self.member}: it has .{', .'.join(sample.extensions)}", *where)
            else:
                content = self._decode(contents[self.member], where)
        except Damaged as error:
            report(Loss(error, number, 1))
            return
        if content is not None:
            yield number, content

    def _decode(self, data: bytes, where: tuple[str, int, str]) -> Content:
        kind = self.member.rpartition(".")[2]
        try:
            if kind == "npy":
                return content_of(np.load(io.BytesIO(data), allow_pickle=False), self.member, where)
            text = data.decode()
            if kind != "json":
                return text
            values = json.loads(text)
        except UnicodeDecodeError as error:
            byte = f"byte {data[error.start]:#04x} at offset {error.start}"
            raise Damaged(f"its .{self.member} is not UTF-8: {byte}", *where) from error
        except (ValueError, EOFError, RecursionError) as error:
            if isinstance(error, Damaged):
                raise
            raise Damaged(f"its .{self.member} cannot be read: {error}", *where) from error
        if isinstance(values, dict):
            if self.json_key not in values:
                raise Damaged(f"its .{self.member} has no {self.json_key!r}: it has {', '.join(values)}", *where)
            values = values[self.json_key]
        return content_of(values, self.member, where)

    def _index(self, shard: Shard, store: Store) -> Index:
        if scheme(shard.url) == "file" and (found := _stored(Path(f"{local_path(shard.url)}.index"), shard.size)):
            return found
        named = hashlib.sha256(f"{shard.url}\n{shard.size}\n{shard.version}".encode()).hexdigest()[:32]
        kept = self.indexes / f"{named}.index"
        if found := _stored(kept, shard.size):
            return found
        index = build_index(_Through(shard, store))
        try:
            write_index(kept, index, shard.size)
        except OSError as error:
            log.info("%s not written, so %s is read through again: %s", kept, shard.url, error)
        return index


def write_index(path: Path, index: Index, size: int) -> None:
    """Keep the index of an archive of `size` bytes at `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(dump(index, size))
    temporary.replace(path)


def open_webdataset(config: DataConfig) -> Splits:
    """`data=webdataset`: the shards of `data.urls`. Raises ValueError when there are none."""
    urls = addresses(config.urls)
    if not urls:
        raise ValueError("data=webdataset needs data.urls=PATTERN, such as shards/s-{000..099}.tar")
    args = known_args(config, "data=webdataset", member="txt", json_key="text", map=None)
    shards = look_up(urls, patience_of(config))
    piped = [shard.size < 0 for shard in shards]
    if any(piped) and not all(piped):
        raise ValueError("data.urls: pipes and files cannot be mixed in one source")
    blocks = ByteBlocks(shards, None if any(piped) else bytes_of_split(config, shards))
    return TarShards(blocks, args["member"], args["json_key"], args["map"], cache_root(config) / "indexes")


class _Through:
    """A shard read from its beginning to its end, as the file that `build_index` takes."""

    def __init__(self, shard: Shard, store: Store) -> None:
        self._shard, self._store = shard, store
        self._byte, self._held, self._at = 0, b"", 0

    def read(self, size: int) -> bytes:
        if len(self._held) - self._at < size:
            more = self._store.read(self._shard, self._byte, self._byte + max(_CHUNK, size))
            self._held, self._at = self._held[self._at :] + more, 0
            self._byte += len(more)
        found = self._held[self._at : self._at + size]
        self._at += len(found)
        return found


def _stored(path: Path, size: int) -> Index | None:
    try:
        return _loaded(path, size, path.stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=64)  # a block is read faster than the index of a shard of thousands of samples is parsed
def _loaded(path: Path, size: int, changed: int) -> Index | None:
    return load(path.read_bytes(), size)


def _after(index: Index) -> str | None:
    return f"after {index.samples[-1].key}" if index.samples else None
