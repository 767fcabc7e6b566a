"""The second tier: checkpoints behind an fsspec URL (file, s3, gs, ...).

    URL/OWNER                                   the run that keeps its checkpoints here
    URL/step-00000200/MANIFEST.json             put last, and only if there is none: it makes the rest a checkpoint
    URL/step-00000200/attempt-3/rank-00000...   what the manifest of that attempt lists, as on the first tier

No file is ever written by two attempts, so a checkpoint here is as immutable as a local one. Every call is bounded in
time and tried again with growing pauses; what it returns is checked by size here and block by block when it is read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from stoker.checkpoint.format import Manifest, decode_manifest, decode_state, digest
from stoker.checkpoint.names import (
    MANIFEST,
    OWNER,
    STATE,
    CheckpointMismatch,
    DamagedCheckpoint,
    data_name,
    one_line,
    step_directory,
    step_of,
)
from stoker.checkpoint.owner import NotOurs, Owner, decode_owner, encode_owner, problem_with

log = logging.getLogger(__name__)
T = TypeVar("T")

_SLOWEST_BYTES_PER_SECOND = 1 << 20  # a slower transfer counts as hung
_LONGEST_PAUSE = 30.0  # seconds


class RemoteFailed(OSError):
    """A call to the remote has failed after all retries. One line."""


class Remote:
    """The checkpoints of one run at `url`. `tries` calls, each of at most `call_seconds` and what its bytes need more.

    `pause_seconds` is waited after the first failure, twice as long after the next. Calls raise RemoteFailed.
    """

    def __init__(self, url: str, *, tries: int = 5, pause_seconds: float = 0.5, call_seconds: float = 60.0) -> None:
        self.url = url
        self._tries, self._pause, self._call_seconds = tries, pause_seconds, call_seconds
        self._opened: tuple[Any, str] | None = None

    def owner(self) -> Owner | None:
        """The run that keeps its checkpoints here; None if none has yet. Raises NotOurs for an invalid mark.

        Where an older version left none, the run that the newest checkpoint is of (see `stoker.checkpoint.owner`).
        """
        data = self._read(OWNER)
        if data is not None:
            return decode_owner(data, f"{self.url}/{OWNER}")
        for step in self.steps():
            found = self.manifest(step)
            if found is not None:
                with contextlib.suppress(DamagedCheckpoint, KeyError, TypeError):
                    return Owner("", os.path.realpath(self.state(found[0])["config"]["run"]["dir"]))
        return None

    def claim(self, mine: Owner, adopt: bool = False) -> None:
        """Mark the place as this run's. Raises NotOurs if it is another's, unless `adopt`."""
        found = self.owner()
        if found == mine:
            return
        problem = problem_with(found, mine, mine.directory, self.url)
        if problem is not None and not adopt:
            raise NotOurs(problem)
        data = encode_owner(mine)
        first = found is None or not found.run
        # of two runs at the same time one is first, if the store supports it
        mode = {"mode": "create"} if first else {}

        def put(files: Any, root: str) -> None:
            try:
                files.pipe_file(f"{root}/{OWNER}", data, **mode)
            except Exception:  # stores raise different errors for "it exists": check
                if self._read(OWNER) is None:
                    raise

        self._call("mark", put, len(data))
        now = self.owner()
        problem = problem_with(now, mine, mine.directory, self.url)
        if problem is not None:
            raise NotOurs(problem)

    def steps(self) -> list[int]:
        """The steps of which anything is there, newest first."""

        def listed(files: Any, root: str) -> list[str]:
            try:
                return [entry["name"] for entry in files.ls(root, detail=True)]
            except FileNotFoundError:
                return []

        steps = {step_of(Path(name.rstrip("/"))) for name in self._call("list", listed)}
        return sorted((step for step in steps if step is not None), reverse=True)

    def manifest(self, step: int) -> tuple[Manifest, bytes] | None:
        """The manifest of `step` here; None without one, or for a damaged one, which is logged."""
        where = f"{self.url}/{step_directory(Path(), step)}/{MANIFEST}"
        data = self._read(f"{step_directory(Path(), step)}/{MANIFEST}")
        if data is None:
            return None
        try:
            manifest = decode_manifest(data, where)
            if manifest.step != step:
                raise DamagedCheckpoint(f"{where}: of step {manifest.step}")
            return manifest, data
        except (DamagedCheckpoint, CheckpointMismatch) as error:
            log.warning("passed over: %s", one_line(error))
            return None

    def state(self, manifest: Manifest) -> dict[str, Any]:
        """The saved state other than tensors. Raises DamagedCheckpoint."""
        name = _name(manifest.step, manifest.attempt, STATE)
        data = self._read(name)
        if data is None or digest(data) != manifest.files[STATE]:
            raise DamagedCheckpoint(f"{self.url}/{name}: {'missing' if data is None else 'changed since written'}")
        return decode_state(data, f"{self.url}/{name}")

    def size(self, manifest: Manifest, name: str) -> int | None:
        """Bytes of a file of the checkpoint; None if it does not exist."""

        def looked_up(files: Any, root: str) -> int | None:
            try:
                return files.info(f"{root}/{_name(manifest.step, manifest.attempt, name)}")["size"]
            except FileNotFoundError:
                return None

        return self._call(f"look up {name}", looked_up)

    def put(self, checkpoint: Path, manifest: Manifest, name: str) -> None:
        """Upload a file of a local checkpoint, unless the remote has all of it."""
        size = (checkpoint / name).stat().st_size
        if self.size(manifest, name) == size:
            return
        target = _name(manifest.step, manifest.attempt, name)
        self._call(
            f"upload {name}", lambda files, root: files.put_file(str(checkpoint / name), f"{root}/{target}"), size
        )

    def commit(self, checkpoint: Path, manifest: Manifest) -> bool:
        """Put the manifest, if there is none. Whether the checkpoint there is now this one."""
        data = (checkpoint / MANIFEST).read_bytes()
        name = f"{step_directory(Path(), manifest.step)}/{MANIFEST}"

        def create(files: Any, root: str) -> None:
            try:
                files.pipe_file(f"{root}/{name}", data, mode="create")
            except Exception:  # stores raise different errors for "it exists": check
                if self._read(name) is None:
                    raise

        self._call("commit", create, len(data))
        return self._read(name) == data

    def get(self, manifest: Manifest, name: str, target: Path) -> None:
        """Download a file to `target`. Raises DamagedCheckpoint if it is not there."""
        size = self.size(manifest, name)
        if size is None:
            raise DamagedCheckpoint(f"{self.url}/{_name(manifest.step, manifest.attempt, name)}: missing")
        source = _name(manifest.step, manifest.attempt, name)
        self._call(f"download {name}", lambda files, root: files.get_file(f"{root}/{source}", str(target)), size)

    def remove(self, step: int) -> None:
        """Remove a checkpoint, its manifest first."""
        name = str(step_directory(Path(), step))

        def remove(files: Any, root: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                files.rm_file(f"{root}/{name}/{MANIFEST}")
            with contextlib.suppress(FileNotFoundError):
                files.rm(f"{root}/{name}", recursive=True)

        self._call(f"remove step {step}", remove)

    def _read(self, name: str) -> bytes | None:
        def read(files: Any, root: str) -> bytes | None:
            try:
                return files.cat_file(f"{root}/{name}")
            except FileNotFoundError:
                return None

        return self._call(f"read {name}", read)

    def _call(self, what: str, act: Callable[[Any, str], T], size: int = 0) -> T:
        """`act(file system, root)`, again and again if need be."""
        seconds = self._call_seconds + size / _SLOWEST_BYTES_PER_SECOND
        pause = self._pause
        for left in range(self._tries - 1, -1, -1):
            try:
                return _within(seconds, lambda: act(*self._open()))
            except (DamagedCheckpoint, NotOurs, ImportError):
                raise
            except Exception as error:  # of any kind: each store's library has its own errors
                reason = f"{type(error).__name__}: {one_line(error)}"
            if left:
                log.info("%s: cannot %s, trying again in %.1f s: %s", self.url, what, pause, reason)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        raise RemoteFailed(f"{self.url}: cannot {what}, tried {self._tries} times: {reason}")

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            from fsspec.core import url_to_fs  # here, as few runs need it

            own = {"auto_mkdir": True} if "://" not in self.url or self.url.startswith("file:") else {}
            files, root = url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True, **own)
            self._opened = files, root.rstrip("/")
        return self._opened


def names_of(manifest: Manifest) -> list[str]:
    """The files of a checkpoint without its manifest, in an order that is the same on all ranks."""
    return sorted([*manifest.files, *(data_name(rank) for rank in manifest.ranks)])


def _name(step: int, attempt: int, name: str) -> str:
    return f"{step_directory(Path(), step)}/attempt-{attempt}/{name}"


def _within(seconds: float, act: Callable[[], T]) -> T:
    """Returns or raises as `act` does. Raises TimeoutError, and abandons the thread, when it does neither in time."""
    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(act())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="checkpoint remote", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
