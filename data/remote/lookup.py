"""Looking shards up: how large each is, and which version of it is there."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from data.remote.retries import PATIENCE, Patience, Refused, Transient, persist
from data.remote.shards import Shard, local_path, scheme
from data.remote.store import open_system
from data.remote.web import Web

_AT_ONCE = 32  # requests


def look_up(urls: Sequence[str], patience: Patience = PATIENCE) -> list[Shard]:
    """The shards at `urls`, in their order. Raises ValueError, naming it, for the first that is not there."""
    web = Web(patience)
    systems = {name: open_system(name, patience) for name in {*map(scheme, urls)} - {"file", "pipe", "http", "https"}}

    def one(url: str) -> Shard:
        kind = scheme(url)
        if kind == "file":
            return _local(url)
        if kind == "pipe":
            return Shard(url, -1)
        if kind in ("http", "https"):
            return _patiently(url, patience, lambda: web.head(url))
        return _patiently(url, patience, lambda: _information(systems[kind].info(url)))

    if all(scheme(url) in ("file", "pipe") for url in urls):
        return [one(url) for url in urls]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(one, urls))


def _local(url: str) -> Shard:
    path = local_path(url)
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"cannot read {path}: it is no regular file")
    return Shard(url, status.st_size)


def _patiently(url: str, patience: Patience, ask: Callable[[], tuple[int, str]]) -> Shard:
    found: list[tuple[int, str]] = []

    def attempt(_: int) -> Iterator[bytes]:
        try:
            found.append(ask())
        except (Transient, Refused):
            raise
        except FileNotFoundError as error:
            raise Refused("it is not there") from error
        except PermissionError as error:
            raise Refused(f"it may not be read: {error}") from error
        except Exception as error:  # every file system of fsspec has errors of its own
            raise Transient(f"{type(error).__name__}: {error}") from error
        return iter(())

    try:
        persist(patience, attempt, lambda: None, url)
    except (Transient, Refused) as error:
        raise ValueError(f"cannot read {url}: {error}") from error
    return Shard(url, *found[0])


def _information(values: dict) -> tuple[int, str]:
    return int(values["size"]), str(values.get("ETag") or values.get("etag") or "")
