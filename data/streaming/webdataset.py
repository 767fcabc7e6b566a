"""`data=webdataset`: splits of tar shards, in blocks of bytes: a sample belongs to the block in which it begins.

webdataset defines samples and their contents (tar.py, members.py); their positions are computed here.

The positions of a shard's samples come from an index, which is built when the shard is first read (by reading all of
it) and kept: beside the shard as NAME.index, if it was made there, else below `data.cache`. The split of a sample
follows from its position alone, so an existing index changes only the number of bytes read.
"""

from __future__ import annotations

import io
import logging
import os
import shlex
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from stoker.conf.schema import DataConfig
from stoker.conf.targets import import_target
from stoker.data.cache import cache_root
from stoker.data.keys import IndexKey, SplitsKey
from stoker.data.remote import Damaged, Leftover, Loss, Report
from stoker.data.remote.contents import content_of as content_of_shards
from stoker.data.remote.damage import printable
from stoker.data.remote.lookup import look_up
from stoker.data.remote.shards import Shard, addresses, local_path, names_fingerprint, scheme
from stoker.data.remote.store import Store
from stoker.data.streaming.lines import content_of
from stoker.data.streaming.members import document_of, refuse_member
from stoker.data.streaming.sources import bytes_of_split, patience_of
from stoker.data.streaming.splits import ByteBlocks, Content, Splits
from stoker.data.streaming.tar import Broken, Compressed, Found, Left, Reader, Sample, samples
from stoker.data.streaming.tar_index import Index, build_index, dump, load
from stoker.data.text import known_args

log = logging.getLogger(__name__)

Map = Callable[[dict[str, Any]], Content | None]  # a user's function: a sample -> a document, or None to leave it out

_CHUNK = 4 << 20  # bytes of one request while a shard is read through


@dataclass(frozen=True)
class TarShards:
    """Splits over tar shards. A document is the member `member` of a sample, or the result of the function `map`."""

    blocks: ByteBlocks
    member: str
    json_key: str
    map: str | None
    indexes: Path  # folder
    content: str | None = None  # see `stoker.data.remote.contents`

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        reading = {"split_bytes": self.blocks.block, "member": self.member, "json_key": self.json_key, "map": self.map}
        shards = names_fingerprint(self.blocks.shards)
        return SplitsKey("webdataset", shards, self.content, tuple(reading.items())).values()

    def __len__(self) -> int:
        return len(self.blocks)

    def read(self, split: int, store: Store, report: Report) -> Iterator[tuple[int, Content]]:
        shard, begin, end = self.blocks.locate(split)
        if shard.size < 0:
            yield from self._read_through(shard, store, report)
            return
        index, kept = self._index(shard, store)
        for left in index.left[slice(*_between(index.left, begin, end, "byte"))]:
            self._report_left(shard, left, report)
        here = index.samples[slice(*_between(index.samples, begin, end, "begin"))]
        number = 0
        if here:
            data = io.BytesIO(store.read(shard, here[0].begin, here[-1].end))
            reader = Reader(data, here[0].begin, here[-1].end)
            try:
                for expected, found in zip(here, samples(reader, shard.url), strict=True):
                    sample = found.sample
                    if sample != expected:
                        which = "its checksum differs from" if sample.key == expected.key else "it is not the one of"
                        raise Broken(sample.begin, f"{which} {kept}: remove that if the shard was replaced on purpose")
                    yield from self._document(shard, found, number, report)
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
        """A shard that is read through a pipe."""
        number, first, last = 0, None, None
        with store.stream(shard) as stream:
            reader = Reader(stream, left=lambda left: self._report_left(shard, left, report))
            try:
                for found in samples(reader, shard.url):
                    if last is not None:
                        yield from self._document(shard, last, number, report)
                        number += 1
                    first, last = first or found.sample, found
            except Compressed as error:
                raise ValueError(f"{shard.url}: {error}: add | {error.command} to the command") from error
            except Broken as error:
                if last is not None and first is not None and (error.whole or not _lacks(last.sample, first)):
                    yield from self._document(shard, last, number, report)
                    number += 1
                near = last.sample.key if last else None
                raise Damaged(error.reason, shard.url, error.byte, near) from error
            while stream.read(_CHUNK):  # to the end of the command, which may still fail
                pass
        if last is not None:
            yield from self._document(shard, last, number, report)

    def _report_left(self, shard: Shard, left: Left, report: Report) -> None:
        if left.extension is not None and (self.map is not None or left.extension == self.member):
            report(Loss(Damaged(f"{left.name} is {left.reason}", shard.url, left.byte, left.name), 0, 0))
        else:
            report(Leftover(shard.url, left.byte, left.name, left.reason))

    def _document(self, shard: Shard, found: Found, number: int, report: Report) -> Iterator[tuple[int, Content]]:
        sample = found.sample
        where = (shard.url, sample.begin, sample.key)
        try:
            if found.wrong is not None:
                raise Damaged(found.wrong, *where)
            if self.map is not None:
                made = import_target(self.map)(found.values)
                content = None if made is None else content_of(made, self.map, where)
            elif self.member not in sample.extensions:
                raise Damaged(f"no member .{self.member}: it has .{', .'.join(sample.extensions)}", *where)
            else:
                content = document_of(self.member, found.values[self.member], self.json_key, where)
        except Damaged as error:
            report(Loss(error, number, 1))
            return
        if content is not None:
            yield number, content

    def _index(self, shard: Shard, store: Store) -> tuple[Index, Path]:
        """The index of a shard, and its file."""
        version = shard.version
        if scheme(shard.url) == "file":
            beside = Path(f"{local_path(shard.url)}.index")
            if found := _stored(beside, shard.size):
                return found, beside
            version = str(_changed(local_path(shard.url)))
        kept = self.indexes / f"{IndexKey(shard.url, shard.size, version).key}.index"
        if found := _stored(kept, shard.size):
            return found, kept
        try:
            index = build_index(_Through(shard, store))
        except Compressed as error:
            local = scheme(shard.url) == "file"
            unpacked = f"{error.command} {shlex.quote(local_path(shard.url))}" if local else f"... | {error.command}"
            raise ValueError(
                f"{shard.url}: {error}. Parts of it cannot be read separately: unpack it, or read it as a whole "
                f"with data.urls=pipe:{unpacked}"
            ) from error
        if index.left:
            first = ", ".join(left.name for left in index.left[:3])
            log.warning(
                "%s: %d members are in no sample, as webdataset reads it: %s%s",
                shard.url, len(index.left), printable(first), " ..." * (len(index.left) > 3),
            )  # fmt: skip
        try:
            write_index(kept, index, shard.size)
        except OSError as error:
            log.info("%s not written, so %s is read through again: %s", kept, shard.url, error)
        return index, kept


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
    refuse_member(args["member"])
    shards = look_up(urls, patience_of(config))
    piped = [shard.size < 0 for shard in shards]
    if any(piped) and not all(piped):
        raise ValueError("data.urls: pipes and files cannot be mixed in one source")
    blocks = ByteBlocks(shards, None if any(piped) else bytes_of_split(config, shards))
    content = content_of_shards(shards, Store(patience_of(config)), cache_root(config))
    return TarShards(blocks, args["member"], args["json_key"], args["map"], cache_root(config) / "indexes", content)


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
        status = path.stat()
        if status.st_size > 4 * size + _CHUNK:  # more than an index of such an archive can have
            return None
        return _loaded(path, size, status.st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=64)  # a block is read faster than the index of a shard of thousands of samples is parsed
def _loaded(path: Path, size: int, changed: int) -> Index | None:
    return load(path.read_bytes(), size)


def _changed(path: str) -> int:
    """When a file was written, as its file system has it; 0 for a missing one, which reading will report."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _between(places: Sequence[Any], begin: int, end: int, name: str) -> tuple[int, int]:
    """The first of `places` whose attribute `name` is at least `begin`, and the first at least `end`."""
    first, after = (bisect_left(places, byte, key=attrgetter(name)) for byte in (begin, end))
    return first, after


def _lacks(last: Sample, first: Sample) -> bool:
    return len(last.extensions) < len(first.extensions)


def _after(index: Index) -> str | None:
    return f"after {index.samples[-1].key}" if index.samples else None
