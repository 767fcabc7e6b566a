"""The contract of a model family: everything that Stoker asks about a kind of model, in one object.

`model.target` names a family, or a plain function `build(config, part)`, which becomes one whose files carry its own
parameter names. `family_of` is the only way from a config to its model: nothing else depends on which family it is.
A part of a model, with its initial values and buffers, is a `stoker.parallel.model.ParallelizableModel`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.conf.targets import import_target
from stoker.models.hugging_face_weights import StoredTensor
from stoker.parallel.model import Part
from stoker.parallel.shards import Chunk
from stoker.parallel.start import Refusals

TRANSFORMERS = "stoker.models.transformers_family:build"


class Described(Protocol):
    """A stored tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """A key of `stoker.parallel.dtypes.DTYPES`, or another of the safetensors format's names."""
        ...


class Readable(Described, Protocol):
    """A tensor of a model folder by a parameter's global name."""

    def read(self, chunk: Chunk) -> Tensor: ...


@dataclass(frozen=True)
class Exported:
    """Tensors of a run that become tensors of a model folder together.

    `names` are global names, `files` the shapes of the results by their names in the folder. `convert` makes the
    results from the tensors, in the order of `names`.
    """

    names: tuple[str, ...]
    files: Mapping[str, tuple[int, ...]]
    convert: Callable[[list[Tensor]], dict[str, Tensor]]


def renamed(name: str, file: str, shape: tuple[int, ...]) -> Exported:
    """The tensor `name`, unchanged, as `file` of a folder."""
    return Exported((name,), {file: shape}, lambda values: {file: values[0]})


class Family(ABC):
    """A kind of model. Subclasses build it; what is not overridden holds for a model with names of its own."""

    refusals: Refusals = Refusals()  # what it cannot train, checked before a rank is spawned
    is_transformers = False  # whether transformers' own class of a model folder computes the same

    @abstractmethod
    def __call__(self, config: ModelConfig, part: Part) -> nn.Module:
        """The `part` of the model, a `ParallelizableModel` without values, on torch's default device."""

    def layer_cost(self, config: ModelConfig, block: nn.Module) -> float:
        """The relative time of a layer: a pipeline is cut by it. By default its parameters, each used once a token."""
        return float(sum(parameter.numel() for parameter in block.parameters()))

    def flops_per_token(self, config: ModelConfig, seq_len: int, parameters: int) -> int:
        """Floating-point operations of training on one token, forward and backward, without attention's scores."""
        return 6 * parameters

    def settled(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of ModelConfig that others of them determine, and that other rooms read: `num_hidden_layers`."""
        return {}

    def context(self, config: ModelConfig, seq_len: int) -> int:
        """Positions that a model trained on rows of `seq_len` tokens supports."""
        return seq_len

    def shape(self, folder: Path, seq_len: int) -> dict[str, Any]:
        """The model of a folder of Hugging Face's as values of ModelConfig by key, for rows of `seq_len` tokens.

        Raises ValueError, naming the file and the key, for a model that this family does not compute.
        """
        raise ValueError("a model with names of its own is built by model.target, which reads no config.json")

    def without_experts(self, config: ModelConfig) -> ModelConfig | None:
        """The model whose MLPs experts of `config` can begin as (`stoker.models.upcycling`); None: there is none."""
        return None

    def stored(self, config: ModelConfig, found: Mapping[str, StoredTensor], names: Iterable[str]) -> Mapping[str, Any]:
        """The tensors of a model folder, `Readable`, by global name; one that the model lacks keeps its own name."""
        return found

    def exported(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Exported]:
        """How parameters and persistent buffers of these `shapes` are written to a model folder."""
        for name, shape in shapes.items():
            yield renamed(name, name, shape)

    def config_json(self, config: ModelConfig, dtype: str, context: int, end: int | None) -> dict[str, Any] | None:
        """The config.json of an export; None: it is not one of Hugging Face's, and model.target builds it again.

        `dtype` is a key of `stoker.models.hugging_face.DTYPES`, `context` the tokens of a row, `end` the id that
        closes documents.
        """
        return None

    def changed_config_json(
        self, folder: Path, config: ModelConfig, dtype: str, same_dtype: bool, seq_len: int
    ) -> dict[str, Any] | None:
        """The config.json of the imported model in `folder`, with what the run changed; None as in `config_json`."""
        return None

    def reference_name(self, name: str) -> str:
        """The name in transformers' model of the parameter of this global name, or of one of its modules."""
        return name


class OwnFamily(Family):
    """A user's function `build(config, part)`."""

    def __init__(self, build: Callable[[ModelConfig, Part], nn.Module]) -> None:
        self._build = build

    def __call__(self, config: ModelConfig, part: Part) -> nn.Module:
        return self._build(config, part)


def family_of(config: ModelConfig) -> Family:
    """The family that `model.target` names. Raises ValueError for a target that cannot be imported."""
    found = import_target(config.target)
    return found if isinstance(found, Family) else OwnFamily(found)


def built_in() -> dict[str, Family]:
    """Stoker's own families by what they are called in messages and docs."""
    return {name: import_target(target) for name, target in BUILT_IN.items()}


BUILT_IN = {"the decoder": ModelConfig().target, "models of transformers": TRANSFORMERS}


def build_on_meta(config: ModelConfig, part: Part) -> nn.Module:
    """The `part` of the model that `config` names, without memory."""
    with torch.device("meta"):
        model = family_of(config)(config, part)
    assert isinstance(model, nn.Module), f"model.target={config.target} built a {type(model).__name__}"
    return model
