"""GPT-2's layers under tensor parallelism: its `Conv1D` is a linear layer with the weight `[in, out]`.

Its attention projects queries, keys and values by one of them, one after the other, and takes them apart by a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stoker.models.transformers_family.packed import packed_entry
from stoker.parallel.registry import Entry
from stoker.parallel.tensor.axis import TensorAxis, sharded_entry
from stoker.parallel.tensor.layers import TensorLayer
from stoker.parallel.tensor.regions import enter, leave

if TYPE_CHECKING:
    from torch import nn


class _Conv1D(TensorLayer):
    axis: TensorAxis | None = None
    weight: nn.Parameter
    bias: nn.Parameter
    nf: int
    unit: int = 1


class ColumnConv1D(_Conv1D):
    """A rank has a share of the output features of each of `packed` projections."""

    packed: int = 1

    def cut(self, axis: TensorAxis) -> list[Entry]:
        self.axis = axis
        entries = [
            packed_entry("weight", self.weight, 1, self.packed, axis, self.unit),
            packed_entry("bias", self.bias, 0, self.packed, axis, self.unit),
        ]
        self.nf //= axis.size
        return entries

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.axis is None else enter(x, self.axis))


class RowConv1D(_Conv1D):
    """A rank has a share of the input features; what the ranks compute is summed, then the bias is added."""

    def cut(self, axis: TensorAxis) -> list[Entry]:
        self.axis = axis
        shape = tuple(self.weight.shape)
        return [sharded_entry("weight", shape, 0, axis.equal_share(shape[0] // self.unit), self.unit)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.axis is None else leave(torch.matmul(x, self.weight), self.axis) + self.bias


class FusedHeads(TensorLayer):
    """An attention that splits the result of its fused projection into parts of `split_size` channels."""

    split_size: int

    def cut(self, axis: TensorAxis) -> list[Entry]:
        self.split_size //= axis.size
        return []
