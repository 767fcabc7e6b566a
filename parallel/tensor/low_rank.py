"""What an adapter adds to a linear layer: the product of two thin matrices (Hu et al. 2021, LoRA, section 4.1), or what
it makes of the layer's weight with it: directions, each of a length that is trained (Liu et al. 2024, DoRA, section 4).

Where tensor-parallel ranks share the layer, the matrix on the side that they share is cut with its weight. The thin
side is whole on every rank, whose gradient is a part of a sum: of the output features of the rank, or of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stoker.parallel.model import Constant, Normal
from stoker.parallel.registry import Entry, Piece
from stoker.parallel.shards import whole
from stoker.parallel.tensor import nf4
from stoker.parallel.tensor.axis import Share, TensorAxis, sharded_entry
from stoker.parallel.tensor.dropout import Dropout
from stoker.parallel.tensor.float8 import linear
from stoker.parallel.tensor.regions import all_reduce

SLOT = "lora"  # the name of a `LowRank` within its linear layer
MAGNITUDE = f"{SLOT}.magnitude.weight"  # of the lengths of a `WeightDecomposed`


class LowRank(nn.Module):
    """`scale * B @ A`, added to the weight of a linear layer: `A` is `[rank, in]`, `B` `[out, rank]`, zero at first.

    In training it takes the layer's input after `dropout`.
    """

    enabled = True

    def __init__(
        self, in_features: int, out_features: int, rank: int, scale: float, dropout: Dropout | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.scale, self.dropout = in_features, scale, dropout
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))

    def own_initial(self, name: str) -> Normal | Constant:
        """As peft's: `A` has the variance of the uniform distribution up to 1 / sqrt(in)."""
        return Normal(1 / math.sqrt(3 * self.in_features)) if name == "A" else Constant(0.0)

    def product(self, layer: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's product with what is added to its weight: `[..., out]`."""
        return of_base(layer, x, bias) + self(x)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output for `x` `[..., in]`: `[..., out]`."""
        scale = self.scale
        if self.training and self.dropout is not None:
            x, scale = self.dropout(x), scale * self.dropout.scale
        return scale * F.linear(F.linear(x, self.A), self.B)

    def cut_columns(self, axis: TensorAxis, share: Share, unit: int) -> list[Entry]:
        """For a layer of which a rank has the output features of `share`."""
        return [_partial("A", self.A, axis), sharded_entry(f"{SLOT}.B", tuple(self.B.shape), 0, share, unit)]

    def cut_rows(self, axis: TensorAxis, share: Share, unit: int) -> list[Entry]:
        """For a layer of which a rank has the input features of `share`."""
        if self.dropout is not None:
            self.dropout.share = range(share.start * unit, share.stop * unit)
        return [sharded_entry(f"{SLOT}.A", tuple(self.A.shape), 1, share, unit), _partial("B", self.B, axis)]


class Magnitude(nn.Module):
    """The lengths of the rows of a weight, `[out]`. It computes in float32: steps of a length are far below itself."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features))

    def own_initial(self, name: str) -> Constant:
        """Until the base's lengths are set."""
        return Constant(1.0)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """`x` `[..., out]` as rows of the lengths held here give it, from rows of `lengths` (fp32 `[out]`)."""
        return (x * (self.weight / lengths)).to(x.dtype)


class WeightDecomposed(LowRank):
    """`m * V / |V|` in the place of a weight W, by rows, with `V = W + scale * B @ A`; `magnitude.weight` is m `[out]`.

    Gradients take |V| as a constant (section 4.3 of the paper).
    """

    _axis: TensorAxis | None = None  # of ranks that share the columns of a row

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float) -> None:
        super().__init__(in_features, out_features, rank, scale)
        self.magnitude = Magnitude(out_features)

    def product(self, layer: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        result = self.magnitude(linear(layer, x, None) + self(x), self.lengths(layer.weight))
        return result if bias is None else result + bias

    @torch.no_grad()
    def lengths(self, weight: Tensor) -> Tensor:
        """|W + scale * B @ A| by rows, fp32 `[out]`, without a matrix of the size of W."""
        a, b = self.A.float(), self.B.float()
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        squares = squares + 2 * self.scale * ((weight @ self.A.T).float() * b).sum(1)
        squares = squares + self.scale**2 * ((b @ (a @ a.T)) * b).sum(1)
        return (squares if self._axis is None else all_reduce(squares, self._axis.group_name)).sqrt()

    def cut_columns(self, axis: TensorAxis, share: Share, unit: int) -> list[Entry]:
        shape = tuple(self.magnitude.weight.shape)
        return [*super().cut_columns(axis, share, unit), sharded_entry(MAGNITUDE, shape, 0, share, unit)]

    def cut_rows(self, axis: TensorAxis, share: Share, unit: int) -> list[Entry]:
        self._axis = axis
        return [*super().cut_rows(axis, share, unit), _partial("magnitude.weight", self.magnitude.weight, axis)]


def low_rank_of(layer: nn.Module) -> LowRank | None:
    """The adapter of a linear layer, if it has one."""
    return getattr(layer, SLOT, None)


def of_base(layer: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` of a linear layer, without an adapter."""
    packed = nf4.packed_of(layer)
    return linear(layer, x, bias) if packed is None else nf4.product(packed, x, bias)


def product(layer: nn.Linear, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` of a linear layer, with what its adapter adds."""
    adapter = low_rank_of(layer)
    return adapter.product(layer, x, bias) if adapter is not None and adapter.enabled else of_base(layer, x, bias)


@contextmanager
def adapters_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    """`modules` compute without their adapters."""
    adapters = [adapter for module in modules for adapter in module.modules() if isinstance(adapter, LowRank)]
    try:
        for adapter in adapters:
            adapter.enabled = False
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


class AdaptedLinear(nn.Linear):
    """torch's linear layer computing by `product`: the class that one with an adapter, or in float8, is given."""

    takes_adapters = True

    def forward(self, x: Tensor) -> Tensor:
        return product(self, x, self.bias)


def takes_adapters(layer: nn.Module) -> bool:
    """Whether `layer` computes by `product`, and cuts an adapter with itself.

    The class that defines `forward`, and the one that defines `cut`, declare it by `takes_adapters`: a class that
    computes or is cut in another way would leave the adapter out.
    """
    if type(layer) is nn.Linear:
        return True
    defining = [
        next((kind for kind in type(layer).__mro__ if name in vars(kind)), None)
        for name in ("forward", "cut")
        if hasattr(layer, name)
    ]
    return isinstance(layer, nn.Linear) and all(vars(kind).get("takes_adapters", False) for kind in defining)


def _partial(name: str, matrix: Tensor, axis: TensorAxis) -> Entry:
    box = whole(tuple(matrix.shape))
    return Entry(f"{SLOT}.{name}", box.sizes, (Piece(box, box),), axis.rank, axis.size, partial=("tp",))
