"""Reading a checkpoint: only the wanted parts, straight to their destination, every byte checked.

A parameter may be stored in another floating-point dtype than a run holds it in: frozen ones are held in the compute
dtype of the run. It is read as it is stored, part by part, and converted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.checkpoint.block_reader import BlockReader, Wanted, read_wanted
from stoker.checkpoint.format import Piece, ShardIndex
from stoker.checkpoint.names import CheckpointMismatch, DamagedCheckpoint
from stoker.checkpoint.stored import Stored, open_checkpoint, state_of
from stoker.checkpoint.tiling import origin, tiling_problem
from stoker.parallel.dtypes import DTYPE_NAMES, DTYPES
from stoker.parallel.shards import PARAMETER, Chunk, Shard, whole

_NAMED = 5  # tensors of each kind that a message names
_FLOATS = ("F32", "BF16", "F16")  # dtypes of parameters


def load(stored: Stored, shards: Sequence[Shard], near: float = 0.0) -> dict[str, Any]:
    """Reads a checkpoint's values straight into `shards`, every byte checked, and returns its state.

    Indexes are read until all shards have been found, beginning with writers `near` this rank (as a share of the ranks:
    0.5 is the middle), so that a rank on an unchanged layout reads its own first. Raises
    CheckpointMismatch, naming the tensors that are missing or of another shape or dtype, with the shards as they were,
    and DamagedCheckpoint, naming file, tensor and block: the shards are then undefined. No single rank can tell
    whether the checkpoint has a tensor too many: see `idle`.
    """
    if not fits(stored, shards):
        refuse(stored.path, mismatches(stored, shards))
    state = state_of(stored.path, stored.manifest)
    for index, found in find_pieces(stored, shards, near):
        wanted, converted = [], []
        for number, piece in found:
            chunk, there = shards[number].chunk, shards[number].data.detach()
            if DTYPES[piece.dtype] == there.dtype:
                wanted.append(Wanted(piece, chunk, there))
                continue
            common = piece.chunk.intersection(chunk)
            assert common is not None, "found for what it holds of the shard"
            stored_as = torch.empty(common.sizes, dtype=DTYPES[piece.dtype])
            wanted.append(Wanted(piece, common, stored_as))
            converted.append((there[common.within(chunk)], stored_as))
        with BlockReader(stored.path, index) as reader, torch.no_grad():
            read_wanted(reader, wanted)
            for there, stored_as in converted:
                there.copy_(stored_as)
    return state


def find_pieces(
    stored: Stored, shards: Sequence[Shard], near: float
) -> list[tuple[ShardIndex, list[tuple[int, Piece]]]]:
    """The files to read, each with its wanted pieces and the numbers of the `shards` that they belong to.

    Raises DamagedCheckpoint unless each element of each shard is there exactly once.
    """
    places: dict[tuple[str, str], list[int]] = {}
    for number, shard in enumerate(shards):
        places.setdefault((shard.kind, shard.name), []).append(number)
    parts: list[list[Chunk]] = [[] for _ in shards]
    missing = {number: shard.chunk.numel for number, shard in enumerate(shards) if shard.chunk.numel}
    files = []
    ranks = stored.manifest.ranks
    for rank in sorted(ranks, key=lambda rank: abs(rank + 0.5 - near * len(ranks))):
        if not missing:
            break
        index, found = stored.index(rank), []
        for piece in index.pieces:
            for number in places.get((piece.kind, piece.name), ()):
                shard = shards[number]
                if piece.shape != tuple(shard.shape) or piece.dtype not in _dtypes(shard):
                    raise DamagedCheckpoint(f"{stored.path}: {piece.tensor}: a piece of {piece.dtype} {piece.shape}")
                common = piece.chunk.intersection(shard.chunk)
                if common is not None and piece.bytes:
                    found.append((number, piece))
                    parts[number].append(common)
                    missing[number] = missing.get(number, 0) - common.numel
        missing = {number: elements for number, elements in missing.items() if elements > 0}
        files += [(index, found)] if found else []
    for shard, held in zip(shards, parts, strict=True):
        base = tuple(-start for start in shard.chunk.offsets)
        problem = tiling_problem(shard.chunk.sizes, [chunk.moved(base) for chunk in held])
        if problem:
            raise DamagedCheckpoint(f"{stored.path}: {shard.kind}/{shard.name}: {problem}")
    return sorted(files, key=lambda file: file[0].rank)


def fits(stored: Stored, shards: Sequence[Shard]) -> bool:
    """Whether `stored` holds the tensors that `shards` are parts of, in their shapes and in dtypes they can have."""
    known = set(stored.origins)
    return all(known.intersection(_origins(shard)) for shard in shards)


def idle(stored: Stored, shards: Sequence[Shard]) -> int:
    """The tensors that none of `shards` is a part of, as bits in the order of `stored.origins`."""
    used = {found for shard in shards for found in _origins(shard)}
    return sum(1 << place for place, found in enumerate(stored.origins) if found not in used)


def _origins(shard: Shard) -> Iterator[str]:
    """The hashes that may name the tensor that `shard` is a part of."""
    return (origin(f"{shard.kind}/{shard.name}", dtype, tuple(shard.shape)) for dtype in _dtypes(shard))


def _dtypes(shard: Shard) -> tuple[str, ...]:
    """The dtypes in which the tensor that `shard` is a part of may be stored, by their names in files."""
    name = DTYPE_NAMES.get(shard.data.dtype, "")
    return _FLOATS if shard.kind == PARAMETER and name in _FLOATS else (name,)


def mismatches(stored: Stored, shards: Sequence[Shard]) -> list[str]:
    """What keeps `stored` from being loaded into `shards`, one line per tensor."""
    found = {}
    for shard in shards:
        label, tensor = f"{shard.kind}/{shard.name}", stored.tensors.get((shard.kind, shard.name))
        if tensor is None:
            found[label] = f"{label} is missing"
        elif tensor.shape != tuple(shard.shape):
            found[label] = f"{label} has shape {tensor.shape}, the model's has {tuple(shard.shape)}"
        elif tensor.dtype not in _dtypes(shard):
            dtype = DTYPE_NAMES.get(shard.data.dtype, str(shard.data.dtype))
            found[label] = f"{label} is {tensor.dtype}, the model's is {dtype}"
    return list(found.values())


def unused(stored: Stored, shards: Sequence[Shard]) -> list[bool]:
    """For each tensor of `stored`, in its order: whether none of `shards` is a part of it."""
    used = {(shard.kind, shard.name) for shard in shards}
    return [key not in used for key in stored.tensors]


def refuse(checkpoint: Path, problems: Iterable[str]) -> None:
    """Raises CheckpointMismatch if there are `problems`."""
    listed = sorted(set(problems))
    if listed:
        text = "; ".join(listed[:_NAMED]) + (f"; and {len(listed) - _NAMED} more" if len(listed) > _NAMED else "")
        raise CheckpointMismatch(f"{checkpoint} is not a checkpoint of this model: {text}")


class TensorReader:
    """Whole tensors of a checkpoint, one at a time and in any order, every byte of them checked.

    Opening raises DamagedCheckpoint or CheckpointMismatch. `stored.tensors` lists what there is, by (kind, name).
    """

    def __init__(self, checkpoint: Path) -> None:
        self.stored = open_checkpoint(checkpoint)
        self._readers: dict[int, BlockReader] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers.values():
            reader.close()

    def read(self, name: str, kind: str = PARAMETER) -> Tensor:
        """A tensor in new memory. Raises DamagedCheckpoint, and KeyError for an unknown one."""
        tensor = self.stored.tensors[kind, name]
        value = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
        for held in tensor.pieces:
            if held.rank not in self._readers:
                self._readers[held.rank] = BlockReader(self.stored.path, self.stored.indexes[held.rank])
            read_wanted(self._readers[held.rank], [Wanted(held.piece, whole(tensor.shape), value)])
        return value


def read_tensors(
    checkpoint: Path, kind: str = PARAMETER, select: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors of `kind` whose name `select` accepts, one at a time, every byte checked.

    Raises DamagedCheckpoint at the first bad block; tensors yielded before are sound.
    """
    with TensorReader(checkpoint) as reader:
        for tensor in reader.stored.tensors.values():
            if tensor.kind == kind and select(tensor.name):
                yield tensor.name, reader.read(tensor.name, kind)
