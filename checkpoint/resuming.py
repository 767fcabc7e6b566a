"""Resuming: all ranks load the newest checkpoint that all of them can read, or none continues."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from stoker.checkpoint.names import (
    DAMAGED,
    MANIFEST,
    CheckpointMismatch,
    DamagedCheckpoint,
    committed,
    fetched_directory,
    one_line,
    step_directory,
    step_of,
)
from stoker.checkpoint.reader import fits, idle, load, mismatches, refuse, unused
from stoker.checkpoint.remote import Remote, RemoteFailed, names_of
from stoker.checkpoint.stored import Stored, open_checkpoint
from stoker.conf.durable import sync_directory, write_durably
from stoker.parallel.shards import Shard

log = logging.getLogger(__name__)

Exchange = Callable[[str], list[str]]
T = TypeVar("T")

_MOST_MISMATCHES = 20  # that a rank sends to the others


def resume(
    directory: Path, shards: Iterable[Shard], exchange: Exchange, rank: int, remote: Remote | None = None
) -> dict[str, Any] | None:
    """Load the newest sound checkpoint into `shards` on all ranks and return its state; None if there is none.

    Called by all ranks together. `exchange` gives every rank the texts of all ranks, in rank order. Rank 0's view of
    `directory` and `remote` decides on the candidates; one of the remote is downloaded first, by all ranks
    together. One that any rank finds damaged is moved to `damaged/`, and all fall back to the one before it. Raises, on
    all ranks alike, CheckpointMismatch when the checkpoint is sound but not one of this model, OSError when a rank
    cannot read it for another reason than damage, and DamagedCheckpoint when there was one and none is sound. After
    an exception the shards are undefined: they are read into directly, without memory for a second copy.
    """
    directory, shards = Path(directory), list(shards)
    found = _together(lambda: _candidates(directory, remote) if rank == 0 else [], exchange)
    told = exchange(json.dumps(found))
    last: DamagedCheckpoint | None = None
    for step, on_remote in json.loads(told[0]):
        checkpoint = step_directory(directory, step)
        try:
            if on_remote:
                assert remote is not None
                _download(remote, step, directory, exchange, rank)
            stored = _together(functools.partial(open_checkpoint, checkpoint), exchange)
            _refuse_together(stored, shards, exchange)
            return _together(functools.partial(load, stored, shards, (rank + 0.5) / len(told)), exchange)
        except DamagedCheckpoint as damage:
            last = damage
            if rank == 0 and checkpoint.exists():  # else it is damaged on the remote, and stays there
                set_aside(checkpoint, one_line(damage))
    if last is not None:
        raise DamagedCheckpoint(
            f"no checkpoint is sound (the last one tried: {one_line(last)}); those in {directory} have been moved to "
            f"{DAMAGED}/; run.fresh=true starts over at step 1"
        )
    return None


def _candidates(directory: Path, remote: Remote | None) -> list[tuple[int, bool]]:
    """(step, is it the remote's?), the newest first and of one step the local one first. Raises OSError.

    If the remote does not answer, local checkpoints are used; without any, this raises.
    """
    here = [(step, False) for checkpoint in committed(directory) if (step := step_of(checkpoint)) is not None]
    there: list[tuple[int, bool]] = []
    if remote is not None:
        try:
            there = [(step, True) for step in remote.steps() if remote.manifest(step)]
        except RemoteFailed as error:
            if not here:
                raise
            log.warning("only local checkpoints are considered: %s", one_line(error))
    return sorted([*here, *there], key=lambda found: (-found[0], found[1]))


def _download(remote: Remote, step: int, directory: Path, exchange: Exchange, rank: int) -> None:
    """Download the remote's checkpoint of `step` as a local one. Every rank downloads a share of its files."""
    partial, world = fetched_directory(directory, step), len(exchange("downloading"))

    def download_share() -> bytes:
        found = remote.manifest(step)
        if found is None:
            raise DamagedCheckpoint(f"{remote.url}: step {step} was removed")
        manifest, data = found
        partial.mkdir(parents=True, exist_ok=True)
        for name in names_of(manifest)[rank::world]:
            remote.get(manifest, name, partial / name)
        return data

    def put_in_place() -> bool:
        if rank == 0:
            write_durably(partial / MANIFEST, data)
            sync_directory(partial)
            partial.rename(step_directory(directory, step))
            sync_directory(directory)
            log.info("downloaded step %d from %s", step, remote.url)
        return True

    data = _together(download_share, exchange)
    _together(put_in_place, exchange)


def set_aside(checkpoint: Path, reason: str) -> Path:
    """Moves a damaged checkpoint to `damaged/`, where it stays for inspection. Returns its new place."""
    shelf = checkpoint.parent / DAMAGED
    shelf.mkdir(parents=True, exist_ok=True)
    target, count = shelf / checkpoint.name, 1
    while target.exists():
        target, count = shelf / f"{checkpoint.name}.{count}", count + 1
    checkpoint.rename(target)
    sync_directory(shelf)
    sync_directory(checkpoint.parent)
    log.error("damaged checkpoint moved to %s: %s", target, reason)
    return target


def _together(act: Callable[[], T], exchange: Exchange) -> T:
    """The result of `act` here, if it worked on all ranks. Otherwise raises the same error on all of them."""
    result: T | None = None
    kind, reason = "", ""
    try:
        result = act()
    except DamagedCheckpoint as error:
        kind, reason = "damaged", one_line(error)
    except CheckpointMismatch as error:
        kind, reason = "mismatch", one_line(error)
    except Exception as error:  # of any kind: the other ranks wait in the exchange for it
        kind, reason = "unreadable", f"{type(error).__name__}: {one_line(error)}"
    outcomes = [tuple(json.loads(text)) for text in exchange(json.dumps([kind, reason]))]
    # Errors other than damage come first: a checkpoint is not set aside because one node cannot reach it.
    for wanted, raised in (("unreadable", OSError), ("mismatch", CheckpointMismatch), ("damaged", DamagedCheckpoint)):
        for rank, (kind, reason) in enumerate(outcomes):
            if kind == wanted:
                raise raised(f"{reason} (seen by rank {rank})")
    assert result is not None
    return result


def _refuse_together(stored: Stored, shards: list[Shard], exchange: Exchange) -> None:
    """Raises CheckpointMismatch on all ranks, naming the mismatches of any rank and the tensors that no rank holds."""
    finding = {"fits": fits(stored, shards), "idle": f"{idle(stored, shards):x}"}
    findings = [json.loads(text) for text in exchange(json.dumps(finding))]
    if all(other["fits"] for other in findings) and not _in_all(findings, "idle"):
        return
    # Only now every index is needed, to name the mismatches.
    found = {"problems": _together(lambda: sorted(mismatches(stored, shards))[:_MOST_MISMATCHES], exchange)}
    spare = sum(1 << place for place, spared in enumerate(unused(stored, shards)) if spared)
    findings = [json.loads(text) for text in exchange(json.dumps(found | {"unused": f"{spare:x}"}))]
    problems = [problem for other in findings for problem in other["problems"]]
    spare = _in_all(findings, "unused")
    labels = (tensor.label for tensor in stored.tensors.values())
    problems += [f"{label} is not in the model" for place, label in enumerate(labels) if spare >> place & 1]
    refuse(stored.path, problems)


def _in_all(findings: list[dict[str, str]], key: str) -> int:
    """The bits that all of `findings` have."""
    return functools.reduce(lambda bits, other: bits & int(other[key], 16), findings, -1)
