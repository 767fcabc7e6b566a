"""The registry: for each parameter its global shape and where this rank's tensor lies in it.

Attributes on parameters do not survive `to_empty` and `fully_shard`, and one cut cannot describe a fused or padded
tensor, so this knowledge lives beside the model, keyed by global name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.shards import Rectangle, Shard, whole


@dataclass(frozen=True)
class Piece:
    """A rectangle of the module's local tensor and the rectangle of the global tensor that it is."""

    local: Rectangle
    world: Rectangle


@dataclass(frozen=True)
class Entry:
    """One parameter: global shape, the pieces this rank's module holds, and who else holds the same."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    replica: int = 0  # this rank's number among the ranks of the model-parallel axes that hold the same pieces
    replicas: int = 1


@dataclass(frozen=True)
class Held:
    """What ZeRO left of a parameter on this rank: a rectangle of the module's tensor, and who else holds it."""

    rectangle: Rectangle
    replica: int = 0
    replicas: int = 1

    def counted_by(self, index: int) -> bool:
        """Whether this rank counts parameter number `index` in sums over all ranks: one replica does, in turn."""
        return index % self.replicas == self.replica


class Registry:
    """Entries by global name, in the model's order."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = {entry.name: entry for entry in entries}

    def shards(self, name: str, kind: str, held: Held, data: Tensor) -> Iterator[Shard]:
        """`data` (the `held` part of parameter `name`, or optimizer state of its shape) as global rectangles."""
        entry = self.entries[name]
        replica = entry.replica * held.replicas + held.replica
        replicas = entry.replicas * held.replicas
        for piece in entry.pieces:
            part = piece.local.intersection(held.rectangle)
            if part is None:
                continue
            offset = tuple(
                there + here - start
                for there, here, start in zip(piece.world.offset, part.offset, piece.local.offset, strict=True)
            )
            view = data[part.within(held.rectangle)]
            yield Shard(name, kind, entry.shape, Rectangle(offset, part.size), view, replica, replicas)


def uncut(model: nn.Module) -> Registry:
    """The registry of a model that no tensor parallelism has cut: every tensor is whole. Tied tensors stand once."""
    entries = []
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"parameter {name} is {parameter.dtype}: build models in float32, `precision` does the rest"
            )
        box = whole(tuple(parameter.shape))
        entries.append(Entry(name, tuple(parameter.shape), (Piece(box, box),)))
    return Registry(entries)
