"""The protocol of a model that Stoker can cut; `stoker.models.decoder` is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from stoker.conf.schema import ModelConfig


@dataclass(frozen=True)
class Part:
    """The piece of a model that one pipeline stage holds."""

    layers: range  # global numbers of its layers
    embedding: bool  # does it turn tokens into activations?
    head: bool  # does it end in the loss?


def whole_model(layers: int) -> Part:
    """The only part when there is no pipeline."""
    return Part(range(layers), embedding=True, head=True)


@dataclass(frozen=True)
class Normal:
    """Initialise with a normal distribution of mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """Initialise with one value."""

    value: float


class ParallelizableModel(Protocol):
    """What an engine asks of a model, besides being an `nn.Module` whose parameters carry global names."""

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """One micro-batch through this part.

        `x` is int64 tokens `[rows, seq_len]` where the part has the embedding, else activations `[tokens, width]`
        with tokens = rows x seq_len, row after row. `positions` is int64 `[rows, seq_len]`; `documents` is int32
        `[rows, seq_len]`, or None when attention may cross documents (it never crosses rows). Returns the fp32 SUM of
        the token losses (labels int64 `[rows, seq_len]`, IGNORE left out) where the part has the head, else
        activations `[tokens, width]`.

        Under sequence parallelism activations between parts are this tensor-parallel rank's share of the tokens.
        """
        ...

    def blocks(self) -> Mapping[str, nn.Module]:
        """The layers of this part by global number, in order: the units that ZeRO gathers and compile compiles."""
        ...

    def initial(self, name: str) -> Normal | Constant:
        """How the parameter of this global name starts."""
        ...

    def rebuild_buffers(self) -> None:
        """Recompute non-persistent buffers on the module's device (they are garbage after `to_empty`)."""
        ...


ModelBuilder = Callable[[ModelConfig, Part], nn.Module]
