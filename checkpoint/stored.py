"""A checkpoint on storage: its manifest, its state, and the positions of its tensors."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from stoker.checkpoint.format import (
    Manifest,
    ReportHead,
    ShardIndex,
    decode_head,
    decode_index,
    decode_manifest,
    decode_state,
    digest,
)
from stoker.checkpoint.names import MANIFEST, STATE, DamagedCheckpoint, index_name, step_of
from stoker.checkpoint.storage import read_json_bytes, read_line
from stoker.checkpoint.tiling import PRIME, StoredTensor, assemble


class Stored:
    """A checkpoint whose manifest and heads of indexes have been checked. Its blocks are checked as they are read.

    The heads hold the values from which rank 0 proved the tensors whole, and name all tensors by their hashes, so that
    the list is known without reading data that grow with ranks times tensors. `index` reads the positions of one
    writer's pieces; `tensors` reads those of all, and proves the tiling piece by piece.
    """

    def __init__(self, path: Path) -> None:
        """Raises DamagedCheckpoint or CheckpointMismatch."""
        self.path = path
        self.manifest = read_manifest(path)
        heads = [_read_head(path, self.manifest, rank) for rank in self.manifest.ranks]
        begun = [origin for head in heads for origin in head.origins]
        self.origins = sorted(set(begun))
        if sum(head.cover for head in heads) % PRIME or len(self.origins) != len(begun):
            _ = self.tensors  # all pieces are needed: an empty tensor may begin twice, any other is not whole

    def index(self, rank: int) -> ShardIndex:
        """What one rank wrote. Raises DamagedCheckpoint, naming the file."""
        return read_index(self.path, self.manifest, rank)

    @functools.cached_property
    def indexes(self) -> dict[int, ShardIndex]:
        """What each rank wrote. Raises DamagedCheckpoint, naming the file."""
        return {rank: self.index(rank) for rank in self.manifest.ranks}

    @functools.cached_property
    def tensors(self) -> dict[tuple[str, str], StoredTensor]:
        """All tensors, by (kind, name). Raises DamagedCheckpoint, naming the file or the tensor that is not whole."""
        try:
            return assemble(self.indexes.values())
        except ValueError as error:
            raise DamagedCheckpoint(f"{self.path}: {error}") from None


def open_checkpoint(checkpoint: Path) -> Stored:
    """Reads and checks the manifest and the heads of the indexes. Raises DamagedCheckpoint or CheckpointMismatch."""
    return Stored(checkpoint)


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises DamagedCheckpoint when there is no valid one, CheckpointMismatch when it is of another format."""
    manifest = decode_manifest(read_json_bytes(checkpoint / MANIFEST), str(checkpoint / MANIFEST))
    named = step_of(checkpoint)
    if named is not None and named != manifest.step:
        raise DamagedCheckpoint(f"{checkpoint}: named as step {named}, but it holds step {manifest.step}")
    return manifest


def read_index(checkpoint: Path, manifest: Manifest, rank: int) -> ShardIndex:
    """The index of one writer. Raises DamagedCheckpoint, naming the file."""
    name = index_name(rank)
    data = read_json_bytes(checkpoint / name)
    _check_listed(checkpoint, manifest, name, data.partition(b"\n")[0])  # its head, which has the digest of the rest
    index = decode_index(data, str(checkpoint / name))
    if (index.rank, index.step, index.attempt) != (rank, manifest.step, manifest.attempt):
        raise DamagedCheckpoint(f"{checkpoint / name}: not of this checkpoint")
    return index


def _read_head(checkpoint: Path, manifest: Manifest, rank: int) -> ReportHead:
    name = index_name(rank)
    line = read_line(checkpoint / name)
    _check_listed(checkpoint, manifest, name, line)
    head = decode_head(line, str(checkpoint / name))
    if (head.rank, head.step, head.attempt) != (rank, manifest.step, manifest.attempt):
        raise DamagedCheckpoint(f"{checkpoint / name}: not of this checkpoint")
    return head


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The saved state other than tensors. Raises DamagedCheckpoint."""
    return state_of(checkpoint, read_manifest(checkpoint))


def state_of(checkpoint: Path, manifest: Manifest) -> dict[str, Any]:
    """The same, for a checkpoint whose manifest has been read."""
    data = read_json_bytes(checkpoint / STATE)
    _check_listed(checkpoint, manifest, STATE, data)
    return decode_state(data, str(checkpoint / STATE))


def _check_listed(checkpoint: Path, manifest: Manifest, name: str, data: bytes) -> None:
    if digest(data) != manifest.files[name]:
        raise DamagedCheckpoint(f"{checkpoint / name}: changed since it was written")
