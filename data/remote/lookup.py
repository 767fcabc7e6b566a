"""Looking shards up: the size of each, and its version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stoker.data.documents import stamp
from stoker.data.remote.retries import PATIENCE, Patience, Refused, Transient, persist
from stoker.data.remote.shards import Shard, local_path, scheme
from stoker.data.remote.systems import open_system, told
from stoker.data.remote.web import Web

_AT_ONCE = 32  # requests
# Keys of fsspec's file systems for the version of a file, or else for its time stamp.
_VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "modification_time",
    "created",
)


def look_up(urls: Sequence[str], patience: Patience = PATIENCE) -> list[Shard]:
    """The shards at `urls`, in their order. Raises ValueError, naming it, for the first that does not exist."""
    web = Web(patience)
    systems = {name: open_system(name, patience) for name in {*map(scheme, urls)} - {"file", "pipe", "http", "https"}}

    def one(url: str) -> Shard:
        kind = scheme(url)
        if kind == "file":
            version, size = stamp(Path(local_path(url)))
            return Shard(url, size, version or "")
        if kind == "pipe":
            return Shard(url, -1)
        if kind in ("http", "https"):
            return _patiently(url, patience, lambda: web.head(url))
        return _patiently(url, patience, lambda: _information(systems[kind], url))

    if all(scheme(url) in ("file", "pipe") for url in urls):
        return [one(url) for url in urls]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(one, urls))


def _patiently(url: str, patience: Patience, ask: Callable[[], tuple[int, str]]) -> Shard:
    found: list[tuple[int, str]] = []

    def attempt(_: int) -> Iterator[bytes]:
        found.append(ask())
        return iter(())

    try:
        persist(patience, attempt, lambda: None, url)
    except (Transient, Refused) as error:
        raise ValueError(f"cannot read {url}: {error}") from error
    return Shard(url, *found[0])


def _information(system: Any, url: str) -> tuple[int, str]:
    with told():
        values = system.info(url)
        return int(values["size"]), str(next(filter(None, map(values.get, _VERSIONS)), ""))
