"""Looking at checkpoints without a model: `describe` for a list, `verify` for a proof."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.checkpoint.format import Manifest, ShardIndex, safetensors_header
from stoker.checkpoint.names import (
    MANIFEST,
    CheckpointMismatch,
    DamagedCheckpoint,
    committed,
    one_line,
    step_of,
)
from stoker.checkpoint.stored import read_index, read_manifest, read_state
from stoker.checkpoint.tiling import assemble

if TYPE_CHECKING:
    from stoker.checkpoint.block_reader import BlockReader

Progress = Callable[[int, int], None]  # bytes read so far, bytes in all

_NAMED = 8  # tensors that a message names


@dataclass(frozen=True)
class Summary:
    """A committed checkpoint in a list. Unreadable values are None, and `problem` is the reason."""

    path: Path
    step: int
    attempt: int | None
    time: float | None  # of the commit, seconds since the epoch
    bytes: int | None  # of tensors
    tensors: int | None
    ranks: int | None  # that wrote it
    layout: str | None
    loss: float | None
    problem: str | None  # one line; None: manifest, state, indexes and file sizes are sound


def describe(directory: Path) -> list[Summary]:
    """The committed checkpoints in `directory`, oldest first, checked without reading tensors."""
    return [_summary(checkpoint) for checkpoint in reversed(committed(Path(directory)))]


def _summary(checkpoint: Path) -> Summary:
    from stoker.checkpoint.block_reader import BlockReader  # with torch

    manifest: Manifest | None = None
    state: dict[str, Any] = {}
    problem = None
    try:
        manifest = read_manifest(checkpoint)
        state = read_state(checkpoint)
        for rank in manifest.ranks:
            index = read_index(checkpoint, manifest, rank)
            BlockReader(checkpoint, index).close()
    except (DamagedCheckpoint, CheckpointMismatch, OSError) as error:
        problem = one_line(error)
    layout, loss = state.get("layout"), state.get("loss")
    step = step_of(checkpoint)
    assert step is not None
    return Summary(
        path=checkpoint,
        step=step,
        attempt=manifest.attempt if manifest else None,
        time=manifest.time if manifest else None,
        bytes=manifest.bytes if manifest else None,
        tensors=manifest.tensors if manifest else None,
        ranks=len(manifest.ranks) if manifest else None,
        layout=layout if isinstance(layout, str) else None,
        loss=float(loss) if isinstance(loss, int | float) else None,
        problem=problem,
    )


def verify(checkpoint: Path, progress: Progress = lambda done, total: None) -> list[str]:
    """Everything that is wrong with a checkpoint, one line each; empty if every byte of it is as written.

    Reads all blocks of all files. Each bad block is named with the tensors in it.
    """
    from stoker.checkpoint.block_reader import BlockReader  # with torch

    problems: list[str] = []
    with _noting(problems):
        manifest = read_manifest(checkpoint)
        with _noting(problems):
            read_state(checkpoint)
        indexes: list[ShardIndex] = []
        for rank in manifest.ranks:
            with _noting(problems):
                indexes.append(read_index(checkpoint, manifest, rank))
        if not problems:
            with _noting(problems):
                _check_whole(checkpoint, manifest, indexes)
        total, done = sum(index.file_bytes for index in indexes), 0
        for index in indexes:
            with _noting(problems), BlockReader(checkpoint, index) as reader:
                for problem, size in _check_blocks(reader):
                    problems += [problem] if problem else []
                    done += size
                    progress(done, total)
    return problems


@contextlib.contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except (DamagedCheckpoint, CheckpointMismatch, OSError) as error:
        problems.append(one_line(error))


def _check_whole(checkpoint: Path, manifest: Manifest, indexes: list[ShardIndex]) -> None:
    try:
        tensors = assemble(indexes)
    except ValueError as error:
        raise DamagedCheckpoint(f"{checkpoint}: {error}") from None
    size = sum(index.file_bytes for index in indexes)
    if (len(tensors), size) != (manifest.tensors, manifest.bytes):
        raise DamagedCheckpoint(
            f"{checkpoint / MANIFEST}: {manifest.tensors} tensors in {manifest.bytes} bytes, "
            f"but the indexes list {len(tensors)} in {size}"
        )


def _check_blocks(reader: BlockReader) -> Iterator[tuple[str | None, int]]:
    """For each block of a shard file: what is wrong with it, and its bytes."""
    index = reader.index
    try:
        header = safetensors_header(index.pieces)
    except ValueError as error:
        raise DamagedCheckpoint(f"{reader.path}: {error}") from None
    ends = [len(header)]
    for piece in index.pieces:
        ends.append(ends[-1] + piece.bytes)
    in_order = [piece.start for piece in index.pieces] == ends[:-1] and ends[-1] == index.file_bytes
    for number, start in enumerate(range(0, index.file_bytes, index.block_bytes)):
        stop = min(start + index.block_bytes, index.file_bytes)
        problem = None
        try:
            data = reader.block(number, _labels(index, start, stop))
            expected = header[start:stop]
            if not in_order or data[: len(expected)].numpy().tobytes() != expected:
                problem = f"{reader.path}: its header does not match its index"
        except DamagedCheckpoint as damage:
            problem = one_line(damage)
        yield problem, stop - start


def _labels(index: ShardIndex, start: int, stop: int) -> str:
    """The tensors that have bytes in this part of the file."""
    first = bisect.bisect_right(index.pieces, start, key=lambda piece: piece.stop)
    last = bisect.bisect_left(index.pieces, stop, key=lambda piece: piece.start)
    found = list(dict.fromkeys(piece.tensor for piece in index.pieces[first:last]))
    return ", ".join(found[:_NAMED]) + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "") or "header"
