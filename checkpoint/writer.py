"""One rank's saves: `Checkpoints` takes a snapshot and does the rest in a background thread."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from stoker.checkpoint.owner import Owner, check_owner
from stoker.checkpoint.remote import Remote
from stoker.checkpoint.retention import Retention, clear_failures, retain
from stoker.checkpoint.staging import Snapshot, StagingPool
from stoker.checkpoint.storage import require_space
from stoker.checkpoint.upload import Uploader, UploadReport
from stoker.conf.durable import write_durably
from stoker.parallel.shards import Shard

log = logging.getLogger(__name__)

_EXIT_SECONDS = 2.0  # a process that ends waits this long for its writer to stop between two blocks


@dataclass
class SaveReport:
    """How a save ended on this rank. Seconds count from the call of `save`; 0.0: it did not get so far."""

    step: int
    bytes: int = 0  # of this rank's shard file; on rank 0, once committed, of all
    staged_bytes: int = 0  # of this rank's shard file
    staged_seconds: float = 0.0  # when the live data could change again
    written_seconds: float = 0.0  # this rank's part was on storage
    seconds: float = 0.0  # committed on all ranks, or failed
    stall_seconds: float = 0.0  # that the trainer was held up: in `save`, the save before included, and `await_staged`
    copy_seconds: float = 0.0  # this rank's copying of live data to the staging pool
    write_seconds: float = 0.0  # this rank's writing and fsync of its shard file
    error: str | None = None  # one line

    @property
    def full(self) -> bool:
        """Whether it failed because the disk was full. The reasons of other ranks are text."""
        return self.error is not None and ("no space" in self.error.lower() or "quota exceeded" in self.error.lower())

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
    before_commit: Callable[[], object] | None
    began: float  # time.monotonic()


class Checkpoints:
    """One rank's writer of the checkpoints of a run. Every rank makes the same calls in the same order.

    `directory` is on a file system that all ranks share; `attempt` is the start of the run that these ranks belong to,
    and rank 0 has called `fence` for it. `keep`, `keep_every` and `keep_best` are those of `Retention`. With mode
    `sync`, `save` returns after the commit. A save that is not committed `timeout_seconds` after its data were written
    fails. `staging_limit`, in bytes, bounds the staging pool: a larger shard file streams through it. `owner` is the
    run that `directory` and `remote` are marked with: when another run has taken them over, saves fail.

    The thread is a daemon and never keeps a process running. A process that ends during a save stops the thread at the
    next block; the files on storage are then garbage that the next attempt removes.
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
        owner: Owner | None = None,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self._directory = Path(directory)
        self._rank, self._world, self._attempt = rank, world, attempt
        self._retention = Retention(keep, keep_every, keep_best)
        self._owner = owner
        self._uploader = Uploader(self._directory, remote, rank, world, self._retention, owner) if remote else None
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

    def save(
        self,
        step: int,
        shards: Iterable[Shard],
        state: dict[str, Any],
        before_commit: Callable[[], object] | None = None,
    ) -> None:
        """Start saving the present values of `shards` and `state` as the checkpoint of `step`.

        On rank 0 `before_commit` is called in the background when all ranks have written; if it raises, the save fails.
        Waits for the save in flight first; a step that is committed already is not saved again. The tensors must not
        be changed until `await_staged`; `state` (rank 0's is stored) may. Later failures are reported by `finished`.
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
        save = _Save(step, partial, final, shards, encoded, self._snapshot, before_commit, time.monotonic())
        self._writer = threading.Thread(target=self._run, args=(save,), name=f"checkpoint {step}", daemon=True)
        self._writer.start()
        if self._mode == "sync":
            self._join()
        self._stalls[step] = time.monotonic() - called

    def inject_failure(self, failure: OSError) -> None:
        """Make the next save of this rank raise `failure` where it writes."""
        self._rehearsed = failure

    def await_staged(self) -> None:
        """Return when the live data may change: the snapshot in flight, if any, has been copied.

        On CUDA the copies may still be queued; what the caller queues on its current stream runs after them.
        """
        if self._snapshot is not None:
            called = time.monotonic()
            self._snapshot.await_staged()
            self._snapshot = None
            if self._stalls:  # of the save in flight; empty: it has ended and been reported
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
        """Return when no save is in flight: committed or failed, with replaced checkpoints removed.

        Returns the reports that `finished` will return next, without taking them.
        """
        self._join()
        if self._tidier is not None:
            self._tidier.join()
        return list(self._ended)

    def uploads(self) -> list[UploadReport]:
        """On rank 0: the uploads to the remote that ended since the last call, well or not."""
        return self._uploader.finished() if self._uploader is not None else []

    def uploading(self, wait_seconds: float) -> bool:
        """Whether this rank has anything left to upload, after waiting for it for at most `seconds`."""
        return self._uploader is not None and self._rank == 0 and self._uploader.busy(wait_seconds)

    def go_on_uploading(self) -> None:
        """Upload the newest checkpoint, if an earlier attempt has not. Called by rank 0 after resuming."""
        if self._uploader is not None and self._rank == 0:
            self._uploader.add_unfinished()

    def close(self) -> None:
        """Wait for the save in flight and end the uploads, if there are any."""
        self._join()
        if self._uploader is not None:
            self._uploader.close()

    def abandon(self) -> None:
        """As `close` after a failure: a save in flight is abandoned at its next block instead of awaited."""
        self._leaving.set()
        if self._writer is not None:
            self._writer.join(_EXIT_SECONDS)
            self._writer = None
        self.close()

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _run(self, save: _Save) -> None:
        report = SaveReport(save.step)
        atexit.register(self._leave, threading.current_thread())
        try:
            self._write(save, report)
        except Exception as error:  # of any kind: it must reach the reports
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
        # this writer finds the fence, or that attempt finds this directory.
        commit.check_fence(self._directory, self._attempt)
        if self._rank == 0 and self._owner is not None:
            check_owner(self._directory, self._owner)
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
            if save.before_commit is not None:
                save.before_commit()
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
        """Remove checkpoints that need not be kept, in a separate thread: large directories take long."""
        try:
            clear_failures(self._directory)  # here: after the next save has begun a note may be needed
        except OSError as error:
            log.warning("%s could not be tidied: %s", self._directory, one_line(error))
        if self._tidier is not None:
            self._tidier.join()
        self._tidier = threading.Thread(target=self._remove_what_is_old, name="checkpoint removal", daemon=True)
        self._tidier.start()

    def _remove_what_is_old(self) -> None:
        try:
            retain(self._directory, self._retention, self._uploader.needed() if self._uploader else ())
        except OSError as error:  # the new checkpoint is committed, and the next commit tidies again
            log.warning("%s could not be tidied: %s", self._directory, one_line(error))

    def _fail(self, save: _Save, error: Exception, reported: bool) -> str:
        """Report a failure here to the other ranks. Returns the reason, which may be rank 0's."""
        reason = one_line(error)
        if self._rank == 0:
            reason = reason if isinstance(error, SaveFailed) else f"rank 0: {reason}"
            commit.give_up(save.partial, reason)
            return reason
        if reported:
            return reason
        # The directory may be gone because rank 0 abandoned the save first: then its reason counts.
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
