"""The protocol of a model that Stoker can parallelize; `stoker.models.decoder` is one."""

from __future__ import annotations

import enum
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


class Role(enum.StrEnum):
    """The role of a parameter in its model, independent of its name: decides on weight decay and update rules.

    A module whose parameters of two or more dims are an embedding or a head has the attribute `role`; torch's own
    `nn.Embedding` needs none. All else is a matrix, or a vector if it has fewer dims.
    """

    MATRIX = "matrix"  # two or more dims
    VECTOR = "vector"  # norms, biases
    EMBEDDING = "embedding"
    HEAD = "head"


class ParallelizableModel(Protocol):
    """What an engine needs of a model, which is an `nn.Module` whose parameters have global names."""

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """One micro-batch through this part.

        `x` is int64 tokens `[rows, seq_len]` where the part has the embedding, else activations `[tokens, width]`
        with tokens = rows x seq_len, row after row. `positions` is int64 `[rows, seq_len]`; `documents` is int32
        `[rows, seq_len]`, or None when attention may cross documents (it never crosses rows). Returns the fp32 SUM of
        the token losses (labels int64 `[rows, seq_len]`, IGNORE_INDEX left out) where the part has the head, else
        activations `[tokens, width]`.

        Under sequence parallelism activations between parts are this tensor-parallel rank's share of the tokens.
        """
        ...

    def blocks(self) -> Mapping[str, nn.Module]:
        """The layers of this part by global number, in order: the units that ZeRO gathers and compile compiles."""
        ...

    def initial(self, name: str) -> Normal | Constant:
        """The initial distribution of the parameter of this global name."""
        ...

    def rebuild_buffers(self) -> None:
        """Give every buffer its first value, on the module's device: built on the meta device, they have none.

        Called once, before a checkpoint is read. Persistent buffers are then part of it. A buffer that is left out
        here is refused.
        """
        ...


ModelBuilder = Callable[[ModelConfig, Part], nn.Module]
