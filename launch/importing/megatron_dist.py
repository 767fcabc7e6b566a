"""Megatron's `torch_dist` folders: tensors of all ranks whole, in a folder of torch.distributed.checkpoint.

`common.pt` holds what is no tensor, the arguments among it. Layers that are alike are one tensor, whose first dim
counts them. In matrices of gate and up all rows of gate come before all rows of up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from stoker.launch.importing.distributed_checkpoint import METADATA, dcp_tensors
from stoker.launch.importing.megatron import RECORDS, iteration_in, megatron_source
from stoker.launch.importing.megatron_arguments import Described, described
from stoker.launch.importing.pickled import held_in
from stoker.launch.importing.source import Source, SourceTensor
from stoker.parallel.shards import Chunk

COMMON = "common.pt"
_LAYERS = "decoder.layers."


def is_torch_dist(folder: Path) -> bool:
    """Whether `folder` is an iteration of this kind, or names one as its newest."""
    try:
        step = iteration_in(folder)
    except (OSError, ValueError):
        return False
    return (step / METADATA).is_file() and (step / COMMON).is_file()


def open_torch_dist(folder: Path, config: str | None, trust: bool) -> Source:
    """The model in `folder`. Raises ValueError, naming a file, for what is damaged, incomplete or another model."""
    step = iteration_in(folder)
    path = step / COMMON
    held = held_in(path, trust, RECORDS)
    if not isinstance(held, dict) or "args" not in held:
        raise ValueError(f"{path} holds no args: it is no file of Megatron's")
    model = dataclasses.replace(described(path, held["args"], config), ranks=1, stages=1)
    tensors, others = dcp_tensors(step)
    layers = {name: [tensor] for name, tensor in _one_by_one(step, tensors, model).items()}
    return megatron_source(f"{step.name} of Megatron", model, layers, others)


def _one_by_one(step: Path, tensors: Mapping[str, SourceTensor], model: Described) -> dict[str, SourceTensor]:
    """`tensors` with those of all layers as one for each layer."""
    found: dict[str, SourceTensor] = {}
    count = model.model.num_hidden_layers
    for name, tensor in tensors.items():
        inner = name.removeprefix(_LAYERS)
        if inner == name or inner.partition(".")[0].isdecimal():
            found[name] = tensor
            continue
        if tensor.shape[:1] != (count,):
            raise ValueError(f"{step / METADATA}: {name} has shape {tensor.shape}: args have num_layers={count}")
        for number in range(count):
            found[f"{_LAYERS}{number}.{inner}"] = _layer(tensor, number)
    return found


def _layer(tensor: SourceTensor, number: int) -> SourceTensor:
    shape = tensor.shape[1:]
    chunk = Chunk((number, *(0 for _ in shape)), (1, *shape))

    def load() -> Tensor:
        return tensor.read(chunk)[0]

    return SourceTensor(tensor.file, shape, tensor.dtype, load)
