"""Models of a user's own that ask more of an engine than the toy, or do what is to be refused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.parallel.model import Part
from stoker.parallel.tensor.layers import ColumnLinear, CopyToTensorParallel, RowLinear
from stoker.parallel.tensor.regions import enter
from tests.toy import Layer, Toy


class Counting(Layer):
    """Counts its forwards in a persistent buffer, and computes something else each time."""

    calls: Tensor
    table: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("table", torch.ones(width), persistent=False)

    def forward(self, x: Tensor, rows: int) -> Tensor:
        if self.training:
            self.calls += 1
            self.seen = self.seen * 0.5 + self.calls  # another tensor each time, as some models have it
        return super().forward((x * self.table * (1.0 + self.calls * 0.05)).to(x.dtype), rows)


class Remembering(Toy):
    def __init__(self, config: ModelConfig, part: Part) -> None:
        super().__init__(config, part)
        self.layers = nn.ModuleDict({str(n): Counting(config.hidden_size) for n in part.layers})

    def rebuild_buffers(self) -> None:
        for layer in self.layers.values():
            layer.calls.zero_()
            layer.seen.zero_()
            layer.table = torch.ones_like(layer.table)


class Forgetful(Remembering):
    def rebuild_buffers(self) -> None:
        self.layers["0"].calls.zero_()


class CountingAtTheTop(Toy):
    """Every stage of a pipeline has the buffer."""

    def __init__(self, config: ModelConfig, part: Part) -> None:
        super().__init__(config, part)
        self.register_buffer("calls", torch.zeros(()))


class Averaging(Toy):
    """A running mean of the activations of this rank's own sequences, as batch norm has it."""

    mean: Tensor

    def __init__(self, config: ModelConfig, part: Part) -> None:
        super().__init__(config, part)
        self.register_buffer("mean", torch.zeros(config.hidden_size))

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert self.embedding is not None and self.head is not None
        x = self.embedding(x)
        if self.training:
            self.mean.lerp_(x.detach().float().mean(0), 0.5)
        for layer in self.layers.values():
            x = layer(x - self.mean, rows=len(positions))
        return self.head(x, labels)

    def rebuild_buffers(self) -> None:
        self.mean.zero_()


class NeverLeaving(Layer):
    """Enters a region, and computes the same on every rank."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)  # type: ignore[assignment]


class NeverEntering(Layer):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.enter = nn.Identity()  # type: ignore[assignment]


class NormInside(Layer):
    """A norm over the channels of a rank, whose gradient nothing sums."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.inside = nn.RMSNorm(2)

    def forward(self, x: Tensor, rows: int) -> Tensor:
        hidden = self.inner(self.enter(self.norm(x))).unflatten(-1, (-1, 2))
        return x + self.outer(self.inside(hidden).flatten(-2))


class TwiceEntering(Layer):
    def forward(self, x: Tensor, rows: int) -> Tensor:
        x = self.enter(self.norm(x))
        return self.outer(torch.tanh(self.inner(x if self.enter.axis is None else enter(x, self.enter.axis))))


class ColumnWithoutRow(Layer):
    """What the ranks compute of their channels is used without being summed."""

    def forward(self, x: Tensor, rows: int) -> Tensor:
        return x + self.inner(self.enter(self.norm(x))).mean(-1, keepdim=True)


LAYERS: dict[str, type[Layer]] = {
    "never left": NeverLeaving,
    "never entered": NeverEntering,
    "norm inside": NormInside,
    "entered twice": TwiceEntering,
    "not summed": ColumnWithoutRow,
    "sound": Layer,
}


class OfLayers(Toy):
    """The toy with the layers that `model.args.layers` names."""

    def __init__(self, config: ModelConfig, part: Part) -> None:
        super().__init__(config, part)
        self.layers = nn.ModuleDict({str(n): LAYERS[config.args["layers"]](config.hidden_size) for n in part.layers})


class Wide(Toy):
    """Between its layers activations have the widths of `model.args.widths`, which no key of the schema holds."""

    def __init__(self, config: ModelConfig, part: Part) -> None:
        super().__init__(config, part)
        widths = config.args["widths"]
        self.layers = nn.ModuleDict({str(n): Widening(widths[n], widths[n + 1]) for n in part.layers})


class Widening(nn.Module):
    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.enter = CopyToTensorParallel()
        self.inner = ColumnLinear(width, 16)
        self.outer = RowLinear(16, wider)

    def forward(self, x: Tensor, rows: int) -> Tensor:
        return torch.tanh(self.outer(torch.tanh(self.inner(self.enter(x)))))


class Deaf(Toy):
    """Its second layer is used by no forward."""

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert self.embedding is not None and self.head is not None
        return self.head(self.layers["0"](self.embedding(x), rows=len(positions)), labels)


class Zeroed(Toy):
    """As Gemma with an embedding scale of zero: the loss is a constant."""

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert self.embedding is not None and self.head is not None
        return self.head(0.0 * self.embedding(x), labels)


class FusedColumn(ColumnLinear):
    """Two projections of the same size in one weight, which tensor parallelism cuts as any other."""

    @property
    def fused(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        return {"weight": (0, (self.in_features, self.in_features))}


class FusedLayer(Layer):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.inner = FusedColumn(width, 2 * width)


class FusedToy(Toy):
    def __init__(self, config: ModelConfig, part: Part) -> None:
        super().__init__(config, part)
        self.layers = nn.ModuleDict({str(n): FusedLayer(config.hidden_size) for n in part.layers})


def build_fused(config: ModelConfig, part: Part) -> nn.Module:
    return FusedToy(config, part)
