"""Layers that tensor parallelism can cut. Until they are cut they are ordinary layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stoker.parallel.registry import Entry, Piece
from stoker.parallel.shards import whole
from stoker.parallel.tensor.axis import Share, TensorAxis, sharded_entry
from stoker.parallel.tensor.float8 import check_share
from stoker.parallel.tensor.low_rank import low_rank_of, product
from stoker.parallel.tensor.regions import enter, leave


class TensorLayer(nn.Module, ABC):
    """A layer that can hold one rank's share. A parameter in no such layer is held whole by every rank."""

    @abstractmethod
    def cut(self, axis: TensorAxis) -> list[Entry]:
        """Compute this rank's share from now on.

        Returns for each parameter the part of it that this rank holds, under its name within the layer; the caller
        puts a parameter of that shape in its place. Raises ValueError for a size that cannot be shared.
        """


class CopyToTensorParallel(TensorLayer):
    """The way into a region, for all column-parallel layers that take the same input."""

    axis: TensorAxis | None = None  # None until the layer is cut

    def cut(self, axis: TensorAxis) -> list[Entry]:
        self.axis = axis
        return []

    def forward(self, x: Tensor) -> Tensor:
        return x if self.axis is None else enter(x, self.axis)


class ColumnLinear(TensorLayer, nn.Linear):
    """A linear layer inside a region: a rank has some of the output features. `unit` of them are never divided.

    With fewer units than ranks, as kv heads may be, adjacent ranks hold the same one.
    """

    takes_adapters = True

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, unit: int = 1) -> None:
        super().__init__(in_features, out_features, bias)
        self.unit = unit

    def cut(self, axis: TensorAxis) -> list[Entry]:
        share = axis.share(_units(self.out_features, self.unit))
        names = ("weight", "bias") if self.bias is not None else ("weight",)
        entries = [sharded_entry(name, tuple(getattr(self, name).shape), 0, share, self.unit) for name in names]
        self.out_features = len(share) * self.unit
        check_share(self, self.out_features)
        adapter = low_rank_of(self)
        return entries if adapter is None else [*entries, *adapter.cut_columns(axis, share, self.unit)]

    def forward(self, x: Tensor) -> Tensor:
        return product(self, x, self.bias)


class RowLinear(TensorLayer, nn.Linear):
    """A linear layer and the way out of a region: a rank has some of the input features.

    What the ranks compute is summed, then the bias is added. `unit` features are never divided.
    """

    takes_adapters = True
    axis: TensorAxis | None = None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, unit: int = 1) -> None:
        super().__init__(in_features, out_features, bias)
        self.unit = unit

    def cut(self, axis: TensorAxis) -> list[Entry]:
        self.axis = axis
        share = axis.equal_share(_units(self.in_features, self.unit))
        entries = [sharded_entry("weight", tuple(self.weight.shape), 1, share, self.unit)]
        self.in_features = len(share) * self.unit
        check_share(self, self.in_features)
        adapter = low_rank_of(self)
        return entries if adapter is None else [*entries, *adapter.cut_rows(axis, share, self.unit)]

    def forward(self, x: Tensor) -> Tensor:
        if self.axis is None:
            return product(self, x, self.bias)
        summed = leave(product(self, x), self.axis)
        return summed if self.bias is None else summed + self.bias


class ReplicatedInTensorParallel(TensorLayer):
    """A mix-in for layers inside a region whose parameters are not sharded but are used on this rank's channels only.

    Their gradient is summed over the ranks.
    """

    def cut(self, axis: TensorAxis) -> list[Entry]:
        boxes = {name: whole(tuple(parameter.shape)) for name, parameter in self.named_parameters()}
        return [
            Entry(name, box.sizes, (Piece(box, box),), axis.rank, axis.size, partial=("tp",))
            for name, box in boxes.items()
        ]


class HeadNorm(ReplicatedInTensorParallel, nn.RMSNorm):
    """RMSNorm over the channels of a head, one weight for all heads, of which a rank has a share."""


class ProjectionNorm(TensorLayer, nn.RMSNorm):
    """RMSNorm over all output features of a ColumnLinear of the same `unit`, of which a rank has a share.

    The ranks sum their squares: one fp32 number a token.
    """

    axis: TensorAxis | None = None
    replicas = 1  # ranks that hold the same units, whose squares are counted once

    def __init__(self, features: int, eps: float, *, unit: int = 1) -> None:
        super().__init__(features, eps)
        self.features, self.unit = features, unit

    def cut(self, axis: TensorAxis) -> list[Entry]:
        share = axis.share(_units(self.features, self.unit))
        self.axis, self.replicas = axis, share.replicas
        return [sharded_entry("weight", (self.features,), 0, share, self.unit)]

    def forward(self, x: Tensor) -> Tensor:
        if self.axis is None:
            return super().forward(x)
        values = x.float()
        squares = values.square().sum(-1, keepdim=True) / self.replicas
        # Out of the region and in again: each rank's result depends on the squares of all, and so do gradients.
        mean = enter(leave(squares, self.axis), self.axis) / self.features
        assert self.eps is not None
        return (values * torch.rsqrt(mean + self.eps) * self.weight).to(x.dtype)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens whose rows this rank holds."""

    axis: TensorAxis
    share: Share

    def own(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """For each of `tokens` (int64) its row on this rank, 0 if it is another rank's, and whether it is this one's.

        Numbers outside the vocabulary are assigned to the first and the last rank, where the lookup fails.
        """
        mine = torch.ones_like(tokens, dtype=torch.bool)
        if self.axis.rank > 0:
            mine &= tokens >= self.share.start
        if self.axis.rank < self.axis.size - 1:
            mine &= tokens < self.share.stop
        return (tokens - self.share.start).masked_fill_(~mine, 0), mine


class VocabularyLayer(TensorLayer):
    """A layer with a `weight` of `[vocab, width]`: a rank has contiguous rows, as evenly many as possible."""

    weight: nn.Parameter
    vocabulary: Vocabulary | None = None  # None until the layer is cut

    def cut(self, axis: TensorAxis) -> list[Entry]:
        shape = tuple(self.weight.shape)
        self.vocabulary = Vocabulary(axis, axis.even_share(shape[0]))
        return [sharded_entry("weight", shape, 0, self.vocabulary.share)]


def _units(features: int, unit: int) -> int:
    if features % unit:
        raise ValueError(f"{features} features are not made of units of {unit}")
    return features // unit
