"""Rank 0's part of a save: from the reports of all ranks to a committed checkpoint, and what precedes it.

Ranks communicate only through the file system: a save cannot delay or hang a collective. A rank reports with its
index, or with a failure file in its place. Rank 0 answers with the rename that commits, or with a failure note beside
the partial directory and the removal of that directory.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stoker.checkpoint.format import (
    Manifest,
    ReportHead,
    decode_head,
    decode_index,
    decode_manifest,
    digest,
    encode_manifest,
)
from stoker.checkpoint.names import (
    FAILED,
    FENCE,
    MANIFEST,
    PARTIAL,
    REMOVED,
    STATE,
    UPLOADING,
    CheckpointMismatch,
    DamagedCheckpoint,
    SaveFailed,
    committed,
    data_name,
    failure_note,
    index_name,
    one_line,
    rank_failure_name,
    step_of,
)
from stoker.checkpoint.storage import discard, read_json_bytes, read_line
from stoker.checkpoint.tiling import PRIME, assemble
from stoker.conf.durable import sync_directory, write_durably
from stoker.conf.records import parse_json

log = logging.getLogger(__name__)

_ABANDONED = ".abandoned"
_POLL_SECONDS = (0.002, 0.5)  # at first, at most


def fence(directory: Path, attempt: int) -> None:
    """Shut out the writers of attempts before `attempt`. Called by rank 0 before any rank of `attempt` saves.

    An orphan that begins a save from now on finds the fence; one that has begun finds its directory renamed away. Also
    deletes unfinished directories of earlier attempts.
    """
    write_durably(directory / FENCE, json.dumps({"attempt": attempt}).encode())
    sync_directory(directory)
    for entry in list(directory.iterdir()):
        if entry.name.endswith(PARTIAL):
            discard(entry, _ABANDONED)
        elif entry.name.endswith((_ABANDONED, REMOVED)):
            discard(entry)
        elif entry.name.endswith(FAILED) or entry.name == UPLOADING:
            entry.unlink(missing_ok=True)


def check_fence(directory: Path, attempt: int) -> None:
    """Raises SaveFailed when a newer attempt has begun."""
    try:
        newest = parse_json((directory / FENCE).read_bytes())["attempt"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError) as error:
        raise SaveFailed(f"{directory / FENCE} cannot be read: {one_line(error)}") from None
    if newest > attempt:
        raise SaveFailed(f"attempt {newest} of this run has begun: attempt {attempt} may not save any more")


def await_reports(partial: Path, world: int, deadline: float, proceed: Callable[[], None]) -> None:
    """Returns as soon as all ranks have reported. Raises SaveFailed when one reports a failure, or at the deadline.

    `deadline` is a time.monotonic(); `proceed` is called while waiting and may raise.
    """
    waiting = set(range(world))
    for _ in _polls(deadline, proceed):
        present = {entry.name for entry in os.scandir(partial)}
        for rank in sorted(waiting):
            if rank_failure_name(rank) in present:
                raise SaveFailed(f"rank {rank}: {_reason_in(partial / rank_failure_name(rank))}")
        waiting = {rank for rank in waiting if index_name(rank) not in present}
        if not waiting:
            return
    missing = ", ".join(map(str, sorted(waiting)[:8])) + (", ..." if len(waiting) > 8 else "")
    raise SaveFailed(f"no report in time from {len(waiting)} of {world} ranks: {missing}")


def commit(partial: Path, final: Path, step: int, attempt: int, world: int, proceed: Callable[[], None]) -> int:
    """Turns `partial`, in which every rank has reported and the state is written, into `final`. Returns its bytes.

    Raises SaveFailed when the tensors are not whole or the run has been fenced, OSError when storage fails.
    """
    heads = [read_line(partial / index_name(rank)) for rank in range(world)]
    try:
        reports = [_checked_report(partial, rank, step, attempt, head) for rank, head in enumerate(heads)]
        tensors = _count_whole_tensors(partial, reports)
    except (ValueError, DamagedCheckpoint) as error:
        raise SaveFailed(one_line(error)) from None
    files = {index_name(rank): digest(head) for rank, head in enumerate(heads)}
    files[STATE] = digest(read_json_bytes(partial / STATE))
    size = sum(report.file_bytes for report in reports)
    manifest = Manifest(step, attempt, time.time(), size, tensors, files)
    write_durably(partial / MANIFEST, encode_manifest(manifest))
    sync_directory(partial)
    proceed()
    check_fence(partial.parent, attempt)
    if os.path.lexists(final):
        raise SaveFailed(f"{final} exists already; a checkpoint is never overwritten")
    partial.rename(final)
    sync_directory(final.parent)
    return size


def _checked_report(partial: Path, rank: int, step: int, attempt: int, head: bytes) -> ReportHead:
    report = decode_head(head, index_name(rank))
    if (report.rank, report.step, report.attempt) != (rank, step, attempt):
        raise SaveFailed(f"{index_name(rank)} is a report of another save")
    for name, expected in (
        (data_name(rank), report.file_bytes),
        (index_name(rank), len(head) + 1 + report.body.bytes),
    ):
        size = (partial / name).stat().st_size
        if size != expected:
            raise SaveFailed(f"{name} has {size} bytes, not the {expected} that rank {rank} wrote")
    return report


def _count_whole_tensors(partial: Path, reports: list[ReportHead]) -> int:
    """How many tensors there are, each covered exactly once. Raises ValueError naming one that is not."""
    origins = [origin for report in reports for origin in report.origins]
    if sum(report.cover for report in reports) % PRIME == 0 and len(set(origins)) == len(origins):
        return len(origins)
    names = (index_name(report.rank) for report in reports)  # now every piece is needed, to name the tensor
    return len(assemble(decode_index(read_json_bytes(partial / name), name) for name in names))


def give_up(partial: Path, reason: str) -> None:
    """Publish why the save in `partial` will not be committed, and remove it."""
    note = failure_note(partial)
    noted = _try_to(lambda: write_durably(note, json.dumps({"reason": reason}).encode()))
    _try_to(lambda: discard(partial, _ABANDONED))
    if not noted:  # perhaps the disk was full, and has space now
        _try_to(lambda: write_durably(note, json.dumps({"reason": reason}).encode()))


def report_failure(partial: Path, rank: int, reason: str) -> None:
    """Report to rank 0 that `rank` cannot write its part. That part is removed first, to make space for the report."""
    _try_to(lambda: (partial / data_name(rank)).unlink(missing_ok=True))
    _try_to(lambda: write_durably(partial / rank_failure_name(rank), json.dumps({"reason": reason}).encode()))
    reason_given(partial)  # if rank 0 has ended already, this removes the directory


def reason_given(partial: Path) -> str | None:
    """Why rank 0 has abandoned the save in `partial`; None if it has not."""
    reason = _reason_in(failure_note(partial))
    if reason is not None:
        _try_to(lambda: discard(partial, _ABANDONED))  # made again by a rank that started after its removal
    elif not partial.exists():
        return "rank 0 has abandoned this save, or a newer attempt has begun"
    return reason


def await_outcome(partial: Path, final: Path, attempt: int, deadline: float, proceed: Callable[[], None]) -> None:
    """Waits for rank 0's commit. Raises SaveFailed when it abandoned the save or was fenced, or at the deadline."""
    for _ in _polls(deadline, proceed):
        reason = reason_given(partial)
        if is_of(final, attempt):  # checked second: the commit may have happened in between
            return
        if reason is not None:
            # Checked again: the directory may have been removed before the first check for the note.
            raise SaveFailed(reason_given(partial) or reason)
    raise SaveFailed(f"rank 0 has neither committed nor abandoned {final.name} in time")


def is_of(checkpoint: Path, attempt: int) -> bool:
    """Whether it is a valid checkpoint that `attempt` has written, rather than something else of that name."""
    try:
        return decode_manifest(read_json_bytes(checkpoint / MANIFEST), MANIFEST).attempt == attempt
    except (DamagedCheckpoint, CheckpointMismatch):
        return False


def is_valid(checkpoint: Path) -> bool:
    """Whether its manifest is byte for byte as written. (`stoker.checkpoint.audit.verify` proves the rest.)"""
    try:
        decode_manifest(read_json_bytes(checkpoint / MANIFEST), MANIFEST)
    except (DamagedCheckpoint, CheckpointMismatch):
        return False
    return True


def newest(directory: Path) -> list[Path]:
    """The checkpoints in `directory` that have a valid manifest, newest first; none if there is no such directory."""
    return [checkpoint for checkpoint in committed(Path(directory)) if is_valid(checkpoint)]


def newest_step(directory: Path) -> int:
    """The step of the newest of them, 0 if there is none."""
    return next((step for checkpoint in newest(directory) if (step := step_of(checkpoint)) is not None), 0)


def _polls(deadline: float, proceed: Callable[[], None]) -> Iterator[None]:
    pause, longest = _POLL_SECONDS
    while True:
        proceed()
        yield
        if time.monotonic() > deadline:
            return
        time.sleep(pause)
        pause = min(pause * 1.5, longest)


def _reason_in(path: Path) -> str | None:
    try:
        return str(parse_json(path.read_bytes())["reason"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return "for a reason that cannot be read"


def _try_to(act: Callable[[], object]) -> bool:
    """Whether `act` worked. For cleanup after a failure, whose errors must not hide the failure itself."""
    try:
        act()
    except OSError as error:
        log.warning("while abandoning a save: %s", one_line(error))
        return False
    return True
