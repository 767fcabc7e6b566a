"""The registry: for each parameter and buffer its record, and the position of this rank's tensor in the global one.

Attributes on parameters do not survive `to_empty` and `fully_shard`, and one cut cannot describe a fused or padded
tensor, so these records are kept beside the model, keyed by global name.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stoker.parallel.layout import View
from stoker.parallel.model import Constant, Normal, Role
from stoker.parallel.shards import Chunk, Shard, whole


@dataclass(frozen=True)
class Piece:
    """A chunk of the module's local tensor and the chunk of the global tensor that it is."""

    local_chunk: Chunk
    global_chunk: Chunk


@dataclass(frozen=True)
class Entry:
    """The record of one parameter or buffer: its global shape, the pieces this rank's module holds, and what it is."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    replica: int = 0  # this rank's number among the ranks of the model-parallel axes that hold the same pieces
    replicas: int = 1
    partial: tuple[str, ...] = ()  # groups of the mesh over which its gradient is still to be summed after backward
    trainable: bool = True
    inside: bool = False  # used in tensor-parallel regions only, where each rank has a share of the channels
    role: Role = Role.MATRIX
    initial: Normal | Constant | None = None  # None: `rebuild_buffers` of the model sets it
    dtype: torch.dtype = torch.float32  # as it is stored; where it is trained, what computes in fewer bits are copies
    buffer: bool = False
    saved: bool = True  # in checkpoints; not so only of buffers that are not persistent
    view: View = View.DATA  # the ranks that hold its copies and shards
    fused: tuple[int, tuple[int, ...]] | None = None  # several matrices in one: the dim along which, and their sizes

    @property
    def matrix_dims(self) -> int:
        """Dims of what an update rule for matrices takes: two too of a stack of matrices, which `fused` declares."""
        return min(2, len(self.shape)) if self.fused is not None else len(self.shape)

    def matrices(self) -> tuple[Chunk, ...]:
        """The chunks of the global tensor that are matrices of their own, such as the projections of a fused one.

        In a stack (`[number, rows, columns]`) these are of one number each.
        """
        if self.fused is None:
            return (whole(self.shape),)
        (dim, sizes), start, found = self.fused, 0, []
        for size in sizes:
            offsets, shape = [0] * len(self.shape), list(self.shape)
            offsets[dim], shape[dim] = start, size
            found.append(Chunk(tuple(offsets), tuple(shape)))
            start += size
        stacked = len(self.shape) - 2
        return tuple(
            Chunk((*number, *chunk.offsets[stacked:]), ((1,) * stacked + chunk.sizes[stacked:]))
            for number in itertools.product(*map(range, self.shape[:stacked]))
            for chunk in found
        )


@dataclass(frozen=True)
class LocalShard:
    """The part of a parameter that ZeRO leaves on this rank, and how many ranks hold the same part.

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

    def roles(self) -> dict[str, Role]:
        return {entry.name: entry.role for entry in self.entries.values()}

    def initial(self, name: str) -> Normal | Constant:
        """The initial distribution of the parameter of this global name."""
        rule = self.entries[name].initial
        assert rule is not None, f"{name} is a buffer, or of a model without `initial`"
        return rule

    def counted(self, name: str, held: LocalShard) -> bool:
        """Whether this rank counts its part of the parameter in sums over all ranks: of its replicas one does.

        A hash of the name selects it, so that the work is spread and no rank needs the other ranks' parameters.
        """
        replica, replicas = self._replica(name, held)
        return zlib.crc32(name.encode()) % replicas == replica

    def counted_in_stage(self, name: str, held: LocalShard) -> bool:
        """As `counted`, in sums over the ranks of this rank's pipeline stages: of a tied parameter both stages count
        it."""
        replica, replicas = self._replica(name, held)
        replicas //= 2 if "ends" in self.entries[name].partial else 1
        return zlib.crc32(name.encode()) % replicas == replica % replicas

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


def entries_of(model: nn.Module) -> list[Entry]:
    """Entries of a model whose tensors this rank holds whole: parameters, tied ones once, then buffers.

    A module may give the initial values of its parameters itself (`own_initial`, by their names within it). One whose
    weights hold several matrices says so in `fused`: by a weight's name within it, the dim and the matrices' sizes.

    Raises ValueError for parameters of another dtype than float32: what computes in fewer bits are copies.
    """
    initial = getattr(model, "initial", None)
    roles: dict[nn.Parameter, Role] = {}
    added: dict[nn.Parameter, Normal | Constant] = {}
    fused: dict[nn.Parameter, tuple[int, tuple[int, ...]]] = {}
    for module in model.modules():
        if (rule_of := getattr(module, "own_initial", None)) is not None:
            added |= {parameter: rule_of(name) for name, parameter in module.named_parameters(recurse=False)}
        fused |= {module.get_parameter(name): parts for name, parts in getattr(module, "fused", {}).items()}
        role = Role.EMBEDDING if isinstance(module, nn.Embedding) else getattr(module, "role", None)
        for parameter in module.parameters(recurse=False):
            if isinstance(role, Role) and parameter.dim() > 1:
                roles.setdefault(parameter, role)  # tied: the role of the first module
    entries = []
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"parameter {name} is {parameter.dtype}: build models in float32; `precision` sets the compute dtype"
            )
        role = roles.get(parameter, Role.MATRIX if parameter.dim() > 1 else Role.VECTOR)
        rule = added.get(parameter)
        if rule is None and initial is not None:
            rule = initial(name)
        record = {"role": role, "initial": rule, "fused": fused.get(parameter)}
        entries.append(_whole(name, parameter, trainable=parameter.requires_grad, **record))
    saved = model.state_dict(keep_vars=True)
    entries += [
        _whole(name, buffer, trainable=False, role=Role.VECTOR, dtype=buffer.dtype, buffer=True, saved=name in saved)
        for name, buffer in model.named_buffers()
    ]
    return entries


def _whole(name: str, tensor: Tensor, **record: Any) -> Entry:
    shape = tuple(tensor.shape)
    box = whole(shape)
    return Entry(name, shape, (Piece(box, box),), **record)


def whole_registry(model: nn.Module) -> Registry:
    """The registry of a model that no tensor parallelism has cut: every tensor is whole."""
    return Registry(entries_of(model))
