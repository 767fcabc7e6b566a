"""Frozen weights in four bits: NF4, the quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, section 3).

Each run of 64 elements of the flattened weight has a scale, its largest magnitude, in fp32 (single quantisation), and
each element the number of the nearest of sixteen values. Values, borders and rounding are those of bitsandbytes, so
that packed weights are equal to the last bit: a number counts as above a border if it is greater. Blocks lie in rows,
which have a multiple of 64 elements, and a rank's share of a row ends at a block's end: so a rank's packed weight is a
slice of the whole, and no layout changes it.

The packed weight is neither a parameter nor a buffer: sharding strategies do not see it, and each data-parallel rank
holds it, 0.5625 bytes an element. A weight in the compute dtype exists while its layer computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stoker.parallel.registry import Entry
from stoker.parallel.shards import PARAMETER, Chunk, Shard

BLOCK = 64  # elements with a scale of their own
SLOT = "nf4"  # the attribute of a linear layer whose weight is packed: a `Packed`
WANTED = "wants_nf4"  # the attribute of one whose weight is to be packed once the layer is cut
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_LEAST = 1e-38  # scale of a block of zeros


@dataclass
class Packed:
    """The weight `[out, in]` of a layer, or this rank's `chunk` of it, by its global name and shape.

    `codes` are uint8 `[rows, columns / 2]`, the first of two in the upper bits; `scales` fp32 `[rows, columns / 64]`.
    """

    name: str
    shape: tuple[int, ...]
    chunk: Chunk
    replica: int
    replicas: int
    codes: Tensor
    scales: Tensor

    def fill(self, values: Tensor) -> None:
        """Set it to float32 `values` of the chunk's sizes."""
        codes, scales = quantised(values)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def shard(self) -> Shard:
        """This part of the weight as float32 without values, to be read and given to `fill`."""
        values = torch.empty(self.chunk.sizes)
        return Shard(self.name, PARAMETER, self.shape, self.chunk, values, self.replica, self.replicas)


def packed_of(layer: nn.Module) -> Packed | None:
    return getattr(layer, SLOT, None)


def pack(layer: nn.Linear, entry: Entry, places: tuple[int, int], device: torch.device) -> None:
    """Put memory for a packed weight in the place of the weight of `layer`, cut already, which `entry` is of.

    `places` are this rank's number among the ranks that read other tokens, and how many there are. Raises ValueError
    where blocks would not end with the rows of this rank.
    """
    (chunk,) = [piece.global_chunk for piece in entry.pieces]
    (rows, columns), every = chunk.sizes, entry.shape[1]
    if every % BLOCK or columns % BLOCK:
        held = f"{columns} of {every}" if columns < every else str(columns)
        raise ValueError(
            f"adapter.base=nf4: a rank has {held} input features of {entry.name}, which are no blocks of {BLOCK}: "
            "adapter.base=null works" + (", or fewer tensor-parallel ranks" if columns < every else "")
        )
    codes = torch.zeros(rows, columns // 2, dtype=torch.uint8, device=device)
    scales = torch.zeros(rows, columns // BLOCK, device=device)
    replica, replicas = entry.replica * places[1] + places[0], entry.replicas * places[1]
    del layer.weight
    setattr(layer, SLOT, Packed(entry.name, entry.shape, chunk, replica, replicas, codes, scales))


def packed_in(modules: Iterable[nn.Module]) -> list[Packed]:
    """All packed weights in these modules."""
    found = (packed_of(part) for module in modules for part in module.modules())
    return [packed for packed in found if packed is not None]


def quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 `values` `[rows, columns]`, as `Packed` holds them."""
    blocks = values.float().unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / scales.clamp_min(_LEAST))[..., None]).clamp_(-1.0, 1.0).flatten(1)
    table = torch.tensor(VALUES, device=values.device)
    numbers = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)
    return numbers[:, ::2] << 4 | numbers[:, 1::2], scales


def dequantised(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[rows, columns]`: each value of the table times its block's scale in float32, rounded to `dtype`."""
    numbers = torch.stack([codes >> 4, codes & 15], -1).flatten(1).int()
    table = torch.tensor(VALUES, device=codes.device)
    blocks = table[numbers].unflatten(1, (-1, BLOCK)) * scales[..., None]
    return blocks.flatten(1).to(dtype)


def rounded(values: Tensor) -> Tensor:
    """What is left of `values` `[rows, columns]` once they are packed, float32."""
    return dequantised(*quantised(values))


def product(packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` in the dtype of `x`."""
    result = _Product.apply(x, packed.codes, packed.scales)
    return result if bias is None else result + bias


class _Product(torch.autograd.Function):
    """The weight has no gradient, and is unpacked again in backward: autograd would keep it in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, dequantised(codes, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        return gradient @ dequantised(codes, scales, gradient.dtype), None, None
