"""Bytes of shards by range: files, http(s), pipes, and all other file systems of fsspec (s3, gs, ...)."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from stoker.data.remote.blocks import BlockCache
from stoker.data.remote.damage import Damaged
from stoker.data.remote.retries import PATIENCE, Patience, Refused, Transient, persist
from stoker.data.remote.shards import Shard, local_path, scheme
from stoker.data.remote.systems import open_system, told
from stoker.data.remote.web import Web

_PIECE = 4 << 20  # bytes of one request where a request cannot be resumed in its middle
_STDERR_BYTES = 4096  # of the end of a failed command's stderr, whose last line is reported


@dataclass
class Traffic:
    """Totals so far: `bytes` from files and servers, without those from the cache, and repeated attempts."""

    bytes: int = 0
    retries: int = 0


class Store:
    """Reads shards. It opens nothing before the first read, so it can be made before a fork."""

    def __init__(self, patience: Patience = PATIENCE, cache: BlockCache | None = None) -> None:
        self.traffic = Traffic()
        self._patience, self._cache = patience, cache
        self._web = Web(patience)
        self._systems: dict[str, Any] = {}
        self._pid = 0

    def read(self, shard: Shard, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end`, cut at the shard's end. Raises Damaged when they cannot be read."""
        end = min(end, shard.size)
        if end <= begin:
            return b""
        if scheme(shard.url) == "file":
            return self._local(shard, begin, end)
        if self._cache is None or not shard.version:  # changes of a shard without a version cannot be detected
            return self._remote(shard, begin, end)
        return self._cache.read(shard, begin, end, self._remote)

    @contextmanager
    def stream(self, shard: Shard) -> Iterator[_Output]:
        """The output of a `pipe:` shard. Raises Damaged, when it is read to its end, if the command fails."""
        command = shard.url.removeprefix("pipe:")
        # Its stderr goes to a file: a pipe that is not read would block it once full.
        with (
            tempfile.TemporaryFile() as stderr,
            subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, stderr=stderr) as process,
        ):
            try:
                yield _Output(process, stderr, shard, self.traffic)
            finally:
                process.kill()

    def _local(self, shard: Shard, begin: int, end: int) -> bytes:
        try:
            with open(local_path(shard.url), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != shard.size:
                    raise Damaged(f"it has {size} bytes now and had {shard.size}: it changed", shard.url)
                file.seek(begin)
                found = file.read(end - begin)
        except OSError as error:
            raise Damaged(error.strerror or str(error), shard.url, begin) from error
        self.traffic.bytes += len(found)
        if len(found) < end - begin:
            raise Damaged(f"it ends after {begin + len(found)} of {shard.size} bytes", shard.url, begin + len(found))
        return found

    def _remote(self, shard: Shard, begin: int, end: int) -> bytes:
        if scheme(shard.url) in ("http", "https"):

            def read(held: int) -> Iterator[bytes]:
                return self._web.read(shard.url, begin + held, end, shard.size, shard.version)
        else:

            def read(held: int) -> Iterator[bytes]:
                return self._pieces(shard, begin + held, end)

        try:
            found = persist(self._patience, read, self._retried, f"{shard.url} from byte {begin}")
        except (Transient, Refused) as error:
            attempts = f", {self._patience.retries + 1} times in a row" if isinstance(error, Transient) else ""
            raise Damaged(f"{error}{attempts}", shard.url, begin) from error
        self.traffic.bytes += len(found)
        return found

    def _pieces(self, shard: Shard, begin: int, end: int) -> Iterator[bytes]:
        system = self._system(scheme(shard.url))
        while begin < end:
            wanted = min(_PIECE, end - begin)
            with told():
                found = system.cat_file(shard.url, start=begin, end=begin + wanted)
            if len(found) > wanted:
                raise Refused(f"{len(found)} bytes instead of the {wanted} asked for")
            begin += len(found)
            yield found
            if len(found) < wanted:
                raise Transient(f"{len(found)} bytes instead of the {wanted} asked for")

    def _system(self, name: str) -> Any:
        if self._pid != os.getpid():  # connections and event loops cannot be shared over a fork
            self._systems, self._pid = {}, os.getpid()
        if name not in self._systems:
            self._systems[name] = open_system(name, self._patience)
        return self._systems[name]

    def _retried(self) -> None:
        self.traffic.retries += 1


class _Output:
    """The output of a command, checked for its exit status."""

    def __init__(self, process: subprocess.Popen[bytes], said: IO[bytes], shard: Shard, traffic: Traffic) -> None:
        self._process, self._said, self._shard, self._traffic = process, said, shard, traffic
        self._byte = 0

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        found = self._process.stdout.read(size)
        self._byte += len(found)
        self._traffic.bytes += len(found)
        if len(found) < size and self._process.wait() != 0:
            self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _STDERR_BYTES))
            said = self._said.read().decode(errors="replace").strip().splitlines()
            reason = f"the command ended with status {self._process.returncode}"
            raise Damaged(": ".join([reason, *said[-1:]]), self._shard.url, self._byte)
        return found
