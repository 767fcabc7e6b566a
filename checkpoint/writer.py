"""Saving, as a rank sees it: `Checkpoints` takes a snapshot and does the rest in a background thread."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.checkpoint import commit
from stoker.checkpoint.block_writer import write_blocks
from stoker.checkpoint.format import BLOCK_BYTES, ShardIndex, encode_index, encode_state
from stoker.checkpoint.names import (
    STATE,
    SaveFailed,
    data_name,
    index_name,
    one_line,
    partial_directory,
    step_directory,
)
from stoker.checkpoint.remote import Remote
from stoker.checkpoint.retention import Retention, clear_failures, retain
from stoker.checkpoint.staging import Snapshot, StagingPool
from stoker.checkpoint.storage import require_space
from stoker.checkpoint.upload import Uploader, UploadReport
from stoker.conf.durable import write_durably
from stoker.parallel.shards import Shard

log = logging.getLogger(__name__)

_EXIT_SECONDS = 2.0  # a process that ends waits so long for its writer to stop between two blocks


@dataclass
class SaveReport:
    """How a save ended, as this rank saw it. Seconds count from the call of `save`; 0.0: it did not get so far."""

    step: int
    bytes: int = 0  # of this rank's shard file; on rank 0, once committed, of all
    staged_bytes: int = 0  # of this rank's shard file
    staged_seconds: float = 0.0  # the live data were free to change
    written_seconds: float = 0.0  # this rank's part was on storage
    seconds: float = 0.0  # committed on all ranks, or failed
    stall_seconds: float = 0.0  # that the trainer was held up: in `save`, the save before included, and `await_staged`
    copy_seconds: float = 0.0  # this rank's copying of live data to the staging pool
    write_seconds: float = 0.0  # this rank's writing and fsync of its shard file
    error: str | None = None  # one line

    @property
    def write_bytes_per_second(self) -> float:
        return self.staged_bytes / self.write_seconds if self.write_seconds else 0.0

    @property
    def commit_seconds(self) -> float:
        """From this rank's part on storage to the checkpoint: waiting for the other ranks, proof, manifest, rename."""
        return self.seconds - self.written_seconds if self.written_seconds else 0.0


@dataclass
class _Save:
    step: int
    partial: Path
    final: Path
    shards: Sequence[Shard]
    state: bytes
    snapshot: Snapshot
    began: float  # time.monotonic()


class Checkpoints:
    """One rank's writer of the checkpoints of a run. Every rank makes the same calls in the same order.

    `directory` is on a file system that all ranks share; `attempt` is the start of the run that these ranks belong to,
    and rank 0 has called `fence` for it. `keep`, `keep_every` and `keep_best` are those of `Retention`. With mode
    `sync`, `save` returns after the commit. A save that is not committed `timeout_seconds` after its data were written
    fails. `staging_limit`, in bytes, bounds the staging pool: a larger shard file streams through it.

    The thread is a daemon: it never keeps a process alive. One that ends in the middle of a save stops it at
    the next block; what is on storage then is garbage that the next attempt removes.
    """

    def __init__(
        self,
        directory: Path,
        *,
        rank: int,
        world: int,
        attempt: int,
        keep: int,
        keep_every: int = 0,
        keep_best: int = 0,
        mode: str = "async",
        staging_limit: int | None = None,
        remote: Remote | None = None,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self._directory = Path(directory)
        self._rank, self._world, self._attempt = rank, world, attempt
        self._retention = Retention(keep, keep_every, keep_best)
        self._uploader = Uploader(self._directory, remote, rank, world, self._retention) if remote else None
        self._mode, self._timeout = mode, timeout_seconds
        self._pool = StagingPool(BLOCK_BYTES, staging_limit)
        self._snapshot: Snapshot | None = None
        self._stalls: dict[int, float] = {}  # seconds, by step
        self._writer: threading.Thread | None = None
        self._tidier: threading.Thread | None = None
        self._ended: deque[SaveReport] = deque()
        self._trials: dict[int, int] = {}
        self._leaving = threading.Event()
        self._rehearsed: OSError | None = None

    def prepare(self, shards: Iterable[Shard]) -> None:
        """Allocate the staging pool before the first save. Raises ValueError for shards that cannot be stored."""
        self._join()
        self._pool.prepare(list(shards))

    def save(self, step: int, shards: Iterable[Shard], state: dict[str, Any]) -> None:
        """Start saving the present values of `shards` and `state` as the checkpoint of `step`.

        Waits for the save in flight first; a step that is committed already is not saved again. The tensors must not
        be changed until `await_staged`; `state` (rank 0's is stored) may. What goes wrong later is told by `finished`.
        Raises TypeError for a state that JSON cannot hold.
        """
        called = time.monotonic()
        self._join()
        encoded = encode_state(state) if self._rank == 0 else b""
        final = step_directory(self._directory, step)
        if commit.is_valid(final):
            return
        trial = self._trials[step] = self._trials.get(step, 0) + 1
        partial = partial_directory(self._directory, step, self._attempt, trial)
        shards = list(shards)
        self._snapshot = Snapshot(shards)
        save = _Save(step, partial, final, shards, encoded, self._snapshot, time.monotonic())
        self._writer = threading.Thread(target=self._run, args=(save,), name=f"checkpoint {step}", daemon=True)
        self._writer.start()
        if self._mode == "sync":
            self._join()
        self._stalls[step] = time.monotonic() - called

    def inject_failure(self, failure: OSError) -> None:
        """Have the next save of this rank meet `failure` where it writes."""
        self._rehearsed = failure

    def await_staged(self) -> None:
        """Return when the live data may change: the snapshot in flight, if any, has been copied.

        On CUDA the copies may still be queued; what the caller queues on its current stream runs after them.
        """
        if self._snapshot is not None:
            called = time.monotonic()
            self._snapshot.await_staged()
            self._snapshot = None
            if self._stalls:  # of the save in flight; none: it has ended and been reported
                self._stalls[max(self._stalls)] += time.monotonic() - called

    def finished(self) -> list[SaveReport]:
        """The saves that ended since the last call, well or not, oldest first. Does not wait."""
        reports = []
        while self._ended:
            report = self._ended.popleft()
            report.stall_seconds = self._stalls.pop(report.step, 0.0)
            reports.append(report)
        return reports

    def wait(self) -> list[SaveReport]:
        """Return when no save is in flight: committed, visible to this rank, or failed; and what it replaced removed.

        Gives the reports that `finished` will give next, without taking them.
        """
        self._join()
        if self._tidier is not None:
            self._tidier.join()
        return list(self._ended)

    def uploads(self) -> list[UploadReport]:
        """On rank 0: the uploads to the remote that ended since the last call, well or not."""
        return self._uploader.finished() if self._uploader is not None else []

    def uploading(self, wait_seconds: float) -> bool:
        """Is anything left to upload by this rank's word, after waiting for it for at most so long?"""
        return self._uploader is not None and self._rank == 0 and self._uploader.busy(wait_seconds)

    def go_on_uploading(self) -> None:
        """Upload the newest checkpoint there is, if an earlier attempt has not. Called by rank 0 after resuming."""
        if self._uploader is not None and self._rank == 0:
            self._uploader.add_unfinished()

    def close(self) -> None:
        """Wait for the save in flight and end the uploads, if there are any."""
        self._join()
        if self._uploader is not None:
            self._uploader.close()

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _run(self, save: _Save) -> None:
        report = SaveReport(save.step)
        atexit.register(self._leave, threading.current_thread())
        try:
            self._write(save, report)
        except Exception as error:  # whatever it is: it must reach the reports, not die with this thread
            report.error = self._fail(save, error, reported=report.written_seconds > 0)
        finally:
            save.snapshot.give_up()
            report.seconds = time.monotonic() - save.began
            self._ended.append(report)
            atexit.unregister(self._leave)

    def _write(self, save: _Save, report: SaveReport) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        save.partial.mkdir(exist_ok=True)
        # After the mkdir: a newer attempt raises its fence first and clears partial directories second, so either
        # we see the fence or it sees our directory.
        commit.check_fence(self._directory, self._attempt)
        plan = self._pool.prepare(save.shards)
        require_space(save.partial, plan.file_bytes)
        rehearsed, self._rehearsed = self._rehearsed, None
        if rehearsed is not None:
            raise rehearsed
        blocks = self._write_blocks(save, report)
        if self._rank == 0:
            write_durably(save.partial / STATE, save.state)
        index = ShardIndex(
            self._rank, save.step, self._attempt, plan.file_bytes, BLOCK_BYTES, tuple(blocks), plan.pieces
        )
        write_durably(save.partial / index_name(self._rank), encode_index(index, plan.cover, plan.origins))
        report.bytes = plan.file_bytes
        report.written_seconds = time.monotonic() - save.began

        deadline = time.monotonic() + self._timeout
        if self._rank == 0:
            commit.await_reports(save.partial, self._world, deadline, self._proceed)
            report.bytes = commit.commit(save.partial, save.final, save.step, self._attempt, self._world, self._proceed)
            if self._uploader is not None:
                self._uploader.add(save.step)
            self._tidy()
        else:
            commit.await_outcome(save.partial, save.final, self._attempt, deadline, self._proceed)

    def _write_blocks(self, save: _Save, report: SaveReport) -> list[int]:
        """Copies and writes this rank's shard file; the CRC32s of its blocks."""
        windows = self._windows(save, report)
        began = time.monotonic()
        try:
            return write_blocks(save.partial / data_name(self._rank), windows, BLOCK_BYTES, self._proceed)
        finally:
            report.write_seconds = time.monotonic() - began - report.copy_seconds

    def _windows(self, save: _Save, report: SaveReport) -> Iterator[memoryview]:
        windows = self._pool.fill(save.shards, save.snapshot)
        while True:
            began = time.monotonic()
            window = next(windows, None)
            report.copy_seconds += time.monotonic() - began
            if window is None:
                break
            report.staged_bytes += len(window)
            report.staged_seconds = time.monotonic() - save.began
            yield window
        save.shards = ()

    def _tidy(self) -> None:
        """Remove what need not be kept, in a thread of its own: large directories take their time."""
        try:
            clear_failures(self._directory)  # here: after the next save has begun a note may be wanted
        except OSError as error:
            log.warning("%s could not be tidied: %s", self._directory, one_line(error))
        if self._tidier is not None:
            self._tidier.join()
        self._tidier = threading.Thread(target=self._remove_what_is_old, name="checkpoint removal", daemon=True)
        self._tidier.start()

    def _remove_what_is_old(self) -> None:
        try:
            retain(self._directory, self._retention, self._uploader.needed() if self._uploader else ())
        except OSError as error:  # the new checkpoint stands, and the next commit tidies again
            log.warning("%s could not be tidied: %s", self._directory, one_line(error))

    def _fail(self, save: _Save, error: Exception, reported: bool) -> str:
        """Tell the other ranks of a failure here. Returns the reason, which may be what rank 0 told us."""
        reason = one_line(error)
        if self._rank == 0:
            reason = reason if isinstance(error, SaveFailed) else f"rank 0: {reason}"
            commit.give_up(save.partial, reason)
            return reason
        if reported:
            return reason
        # Our directory may be gone because rank 0 gave up first: then its reason is the one to tell.
        told = commit.reason_given(save.partial) if isinstance(error, FileNotFoundError) else None
        if told is None:
            commit.report_failure(save.partial, self._rank, reason)
        return told or f"rank {self._rank}: {reason}"

    def _proceed(self) -> None:
        if self._leaving.is_set():
            raise SaveFailed("the process is ending")

    def _leave(self, writer: threading.Thread) -> None:
        self._leaving.set()
        writer.join(_EXIT_SECONDS)
