"""A user's own model, to show and test the protocol of `parallel.model`: two layers that average over past tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.models.embedding import Embedding
from stoker.models.loss import Head
from stoker.parallel.model import Constant, Normal, Part
from stoker.parallel.tensor.layers import ColumnLinear, CopyToTensorParallel, RowLinear


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.enter = CopyToTensorParallel()
        self.inner = ColumnLinear(width, 2 * width)
        self.outer = RowLinear(2 * width, width)

    def forward(self, x: Tensor, rows: int) -> Tensor:
        hidden = torch.tanh(self.inner(self.enter(self.norm(x)))).unflatten(0, (rows, -1))
        steps = torch.arange(1, hidden.shape[1] + 1, device=x.device, dtype=x.dtype)
        return x + self.outer((hidden.cumsum(1) / steps[:, None]).flatten(0, 1))


class Toy(nn.Module):
    def __init__(self, config: ModelConfig, part: Part) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.embedding = Embedding(config.vocab_size, config.hidden_size) if part.embedding else None
        self.layers = nn.ModuleDict({str(n): Layer(config.hidden_size) for n in part.layers})
        weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.head = Head(weight, config.loss_chunk) if part.head else None

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor | None, labels: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers.values():
            x = layer(x, rows=len(positions))
        return x if self.head is None else self.head(x, labels)

    def blocks(self) -> dict[str, nn.Module]:
        return dict(self.layers.items())

    def initial(self, name: str) -> Normal | Constant:
        if name.endswith("norm.weight"):
            return Constant(1.0)
        return Constant(0.0) if name.endswith("bias") else Normal(0.05)

    def rebuild_buffers(self) -> None:
        pass


def build(config: ModelConfig, part: Part) -> nn.Module:
    return Toy(config, part)


def build_frozen(config: ModelConfig, part: Part) -> nn.Module:
    """The toy with its first layer and its head's matrix not trained."""
    model = Toy(config, part)
    assert model.head is not None
    model.layers["0"].requires_grad_(False)
    model.head.weight.requires_grad_(False)
    return model


def build_with_frozen_start(config: ModelConfig, part: Part) -> nn.Module:
    """The toy with only its last layer and its head trained: the first stage of a pipeline trains nothing."""
    model = Toy(config, part)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith((f"layers.{config.num_hidden_layers - 1}", "head")))
    return model


class Skipping(Toy):
    """The toy that leaves its second layer out where positions do not begin at 0: no loss reaches it then."""

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor | None, labels: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for number, layer in self.layers.items():
            if number != "1" or int(positions[0, 0]) == 0:
                x = layer(x, rows=len(positions))
        return x if self.head is None else self.head(x, labels)


def build_skipping(config: ModelConfig, part: Part) -> nn.Module:
    return Skipping(config, part)


def build_all_frozen(config: ModelConfig, part: Part) -> nn.Module:
    """Nothing to train."""
    return Toy(config, part).requires_grad_(False)


def adamw_without_kernels(groups: list[dict[str, object]], lr: float, **settings: object) -> torch.optim.Optimizer:
    """A user's optimizer: it supports neither a gradient scale nor `found_inf`."""
    return torch.optim.AdamW(groups, lr=lr, foreach=False, **settings)  # type: ignore[arg-type]
