"""Uploads: committed checkpoints of the first tier are copied to the second, in the background by all ranks together.

Rank 0 decides what is uploaded and announces it in a file beside the checkpoints; every rank then puts its share of the
files. When rank 0 finds all of them there, it puts the manifest. The queue is short: a remote slower than the saves
gets the newest checkpoints, without some in between.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stoker.checkpoint.commit import is_valid
from stoker.checkpoint.format import Manifest
from stoker.checkpoint.names import (
    UPLOADING,
    CheckpointMismatch,
    DamagedCheckpoint,
    committed,
    one_line,
    step_directory,
)
from stoker.checkpoint.owner import NotOurs, Owner
from stoker.checkpoint.remote import Remote, RemoteFailed, names_of
from stoker.checkpoint.retention import VALIDATION_LOSS, Retention
from stoker.checkpoint.stored import read_manifest
from stoker.conf.durable import write_durably
from stoker.conf.records import parse_json

log = logging.getLogger(__name__)

QUEUE = 2  # checkpoints that wait while one is uploaded
_LOOK_SECONDS = 0.5  # between checks of the announcement, and of uploaded files
_PATIENCE_SECONDS = 1800.0  # for the shares of the other ranks


@dataclass(frozen=True)
class UploadReport:
    """How an upload ended. Only rank 0 has them."""

    step: int
    bytes: int
    seconds: float
    error: str | None = None  # one line


class Uploader:
    """One rank's part of the uploads from `directory` to `remote`. The threads are daemons."""

    def __init__(
        self, directory: Path, remote: Remote, rank: int, world: int, retention: Retention, owner: Owner | None = None
    ) -> None:
        """`owner`: the run that the remote must be marked with before anything is put there or removed."""
        self._directory, self._remote, self._rank, self._world = directory, remote, rank, world
        self._owner = owner
        self._retention = retention
        self._pending: deque[int] = deque()
        self._current: int | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._ended: deque[UploadReport] = deque()
        self._losses: dict[int, float | None] = {}  # of checkpoints on the remote, as far as they were looked up
        threading.Thread(target=self._lead if rank == 0 else self._follow, name="uploads", daemon=True).start()

    def add(self, step: int) -> None:
        """On rank 0: upload the local checkpoint of `step` when those before it are done."""
        with self._changed:
            if step in self._pending or step == self._current:
                return
            self._pending.append(step)
            if len(self._pending) > QUEUE:
                skipped = self._pending.popleft()
                log.warning("step %d is not uploaded to %s, which is too slow", skipped, self._remote.url)
            self._changed.notify_all()

    def add_unfinished(self) -> None:
        """On rank 0, at a start: upload the newest local checkpoint, except files that are there already."""
        valid = (checkpoint for checkpoint in committed(self._directory) if is_valid(checkpoint))
        newest = next(valid, None)
        if newest is not None:
            self.add(read_manifest(newest).step)

    def needed(self) -> set[int]:
        """The local checkpoints that must not be removed yet."""
        with self._changed:
            return {*self._pending, *([] if self._current is None else [self._current])}

    def finished(self) -> list[UploadReport]:
        """The uploads that ended since the last call."""
        reports = []
        while self._ended:
            reports.append(self._ended.popleft())
        return reports

    def busy(self, wait_seconds: float) -> bool:
        """Whether anything is left to upload, after waiting for it for at most `seconds`."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._current is None and not self._pending, wait_seconds)

    def close(self) -> None:
        """Begin no further upload; a running one continues."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()

    def _lead(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing.is_set())
                if self._closing.is_set():
                    return
                step = self._current = self._pending.popleft()
            report = self._upload(step)
            (self._directory / UPLOADING).unlink(missing_ok=True)
            with self._changed:
                self._current = None
                self._ended.append(report)
                self._changed.notify_all()

    def _upload(self, step: int) -> UploadReport:
        checkpoint, began, size = step_directory(self._directory, step), time.monotonic(), 0
        error = None
        try:
            manifest = read_manifest(checkpoint)
            size = manifest.bytes
            if self._owner is not None:
                self._remote.claim(self._owner)
            if self._remote.manifest(step) is None:
                write_durably(self._directory / UPLOADING, json.dumps({"step": step}).encode())
                self._put_share(checkpoint, manifest)
                self._await_all(checkpoint, manifest)
                if not self._remote.commit(checkpoint, manifest):
                    log.warning("%s has another checkpoint of step %d, which stays", self._remote.url, step)
            self._retain()
        except (OSError, DamagedCheckpoint, CheckpointMismatch, NotOurs) as failure:
            error = one_line(failure)
        except Exception as failure:  # a defect: report it instead of ending the thread silently
            log.exception("upload of step %d", step)
            error = f"{type(failure).__name__}: {one_line(failure)}"
        return UploadReport(step, size, time.monotonic() - began, error)

    def _follow(self) -> None:
        done: int | None = None
        for step in self._announced():
            if step is None or step == done:
                done = step
                continue
            try:
                checkpoint = step_directory(self._directory, step)
                self._put_share(checkpoint, read_manifest(checkpoint))
                done = step
            except Exception as failure:  # rank 0 waits for the share, and reports how the upload ended
                log.warning("rank %d's share of step %d: %s", self._rank, step, one_line(failure))

    def _announced(self) -> Iterator[int | None]:
        while not self._closing.wait(_LOOK_SECONDS):
            try:
                yield parse_json((self._directory / UPLOADING).read_bytes())["step"]
            except (OSError, ValueError, KeyError):
                yield None

    def _put_share(self, checkpoint: Path, manifest: Manifest) -> None:
        for name in names_of(manifest)[self._rank :: self._world]:
            self._remote.put(checkpoint, manifest, name)

    def _await_all(self, checkpoint: Path, manifest: Manifest) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        missing = names_of(manifest)
        while True:
            missing = [name for name in missing if self._remote.size(manifest, name) != _size(checkpoint / name)]
            if not missing:
                return
            if time.monotonic() > deadline:
                raise RemoteFailed(
                    f"{self._remote.url}: {missing[0]} was not uploaded within {_PATIENCE_SECONDS:.0f} s"
                )
            time.sleep(_LOOK_SECONDS)

    def _retain(self) -> None:
        """The same rules as on the first tier."""
        found = {step: held[0] for step in self._remote.steps() if (held := self._remote.manifest(step))}
        if self._retention.keep_best:
            for step in found.keys() - self._losses.keys():
                loss = self._remote.state(found[step]).get(VALIDATION_LOSS)
                self._losses[step] = float(loss) if isinstance(loss, int | float) else None
        kept = self._retention.kept({step: self._losses.get(step) for step in found})
        for step in sorted(found.keys() - kept):
            self._remote.remove(step)


def _size(path: Path) -> int:
    return path.stat().st_size
