"""The registry: for each parameter its global shape and where this rank's tensor lies in it.

Attributes on parameters do not survive `to_empty` and `fully_shard`, and one cut cannot describe a fused or padded
tensor, so this knowledge lives beside the model, keyed by global name.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stoker.parallel.shards import Chunk, Shard, whole


@dataclass(frozen=True)
class Piece:
    """A chunk of the module's local tensor and the chunk of the global tensor that it is."""

    local_chunk: Chunk
    global_chunk: Chunk


@dataclass(frozen=True)
class Entry:
    """One parameter: global shape, the pieces this rank's module holds, and who else holds the same."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    replica: int = 0  # this rank's number among the ranks of the model-parallel axes that hold the same pieces
    replicas: int = 1
    partial: tuple[str, ...] = ()  # groups of the mesh over which its gradient is still to be summed after backward
    trainable: bool = True


@dataclass(frozen=True)
class LocalShard:
    """What ZeRO left of a parameter on this rank: a part of the module's tensor, and who else holds it.

    The data of one chunk have its shape. Those of a flat range, which are several chunks (see `flat_range`),
    are one dim: the chunks' elements, one chunk after the other.
    """

    chunks: tuple[Chunk, ...]
    replica: int = 0
    replicas: int = 1

    def views(self, data: Tensor) -> Iterator[tuple[Chunk, Tensor]]:
        """Each chunk with its part of `data`, in its shape and in the same memory."""
        start = 0
        for chunk in self.chunks:
            if data.shape == chunk.sizes:
                yield chunk, data
            else:
                yield chunk, data[start : start + chunk.numel].view(chunk.sizes)
            start += chunk.numel


class Registry:
    """Entries by global name, in the model's order."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = {entry.name: entry for entry in entries}

    def trainable(self) -> list[str]:
        return [entry.name for entry in self.entries.values() if entry.trainable]

    def counted(self, name: str, held: LocalShard) -> bool:
        """Whether this rank counts its part of the parameter in sums over all ranks: of its replicas one does.

        Which one is drawn by the name, so that the work is spread and no rank has to know the others' parameters.
        """
        replica, replicas = self._replica(name, held)
        return zlib.crc32(name.encode()) % replicas == replica

    def _replica(self, name: str, held: LocalShard) -> tuple[int, int]:
        entry = self.entries[name]
        return entry.replica * held.replicas + held.replica, entry.replicas * held.replicas

    def shards(self, name: str, kind: str, held: LocalShard, data: Tensor) -> Iterator[Shard]:
        """`data` (the `held` part of parameter `name`, or optimizer state of its shape) as global chunks."""
        entry = self.entries[name]
        replica, replicas = self._replica(name, held)
        for chunk, values in held.views(data):
            for piece in entry.pieces:
                part = piece.local_chunk.intersection(chunk)
                if part is None:
                    continue
                offset = tuple(
                    there + here - start
                    for there, here, start in zip(
                        piece.global_chunk.offsets, part.offsets, piece.local_chunk.offsets, strict=True
                    )
                )
                view = values[part.within(chunk)]
                yield Shard(name, kind, entry.shape, Chunk(offset, part.sizes), view, replica, replicas)


def whole_entry(name: str, parameter: nn.Parameter) -> Entry:
    """The entry of a parameter that this rank's module holds whole.

    Raises ValueError for another dtype than float32: what computes in fewer bits are copies.
    """
    if parameter.dtype != torch.float32:
        raise ValueError(f"parameter {name} is {parameter.dtype}: build models in float32, `precision` does the rest")
    shape = tuple(parameter.shape)
    box = whole(shape)
    return Entry(name, shape, (Piece(box, box),), trainable=parameter.requires_grad)


def whole_registry(model: nn.Module) -> Registry:
    """The registry of a model that no tensor parallelism has cut: every tensor is whole. Tied tensors stand once."""
    return Registry(whole_entry(name, parameter) for name, parameter in model.named_parameters())
