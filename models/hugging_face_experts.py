"""Experts in Hugging Face's files: a matrix for each expert and projection, or stacked as in our parameters.

Both are read, since transformers writes either; the first is written. Values are not changed, only where they stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stoker.models.family import Exported
from stoker.models.hugging_face_weights import StoredTensor
from stoker.parallel.shards import Chunk

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
_PROJECTIONS = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}
# Mixtral's files have other names than transformers' model of them.
_OTHER_BLOCK = {"mixtral": "block_sparse_moe"}
_OTHER_PROJECTIONS = {"mixtral": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}}
_OF_MIXTRAL = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.(.+)")


@dataclass(frozen=True)
class StackedTensor:
    """The matrices of a layer's experts as one tensor, `Readable`: `parts` are those of each, one below the other."""

    parts: tuple[tuple[StoredTensor, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.parts), sum(part.shape[0] for part in self.parts[0]), self.parts[0][0].shape[1]

    @property
    def dtype(self) -> str:
        return self.parts[0][0].dtype

    def read(self, chunk: Chunk) -> Tensor:
        """Only the bytes of `chunk`, as far as rows go, in the file's dtype."""
        first, count = chunk.offsets[0], chunk.sizes[0]
        inner = Chunk(chunk.offsets[1:], chunk.sizes[1:])
        return torch.stack([torch.cat(list(_read_rows(own, inner))) for own in self.parts[first : first + count]])


def _read_rows(parts: Sequence[StoredTensor], chunk: Chunk) -> Iterator[Tensor]:
    start = 0
    for part in parts:
        found = Chunk((start, 0), part.shape).intersection(chunk)
        if found is not None:
            yield part.read(Chunk((found.offsets[0] - start, found.offsets[1]), found.sizes))
        start += part.shape[0]


def stacked(found: Mapping[str, StoredTensor], names: Mapping[str, int]) -> dict[str, Any]:
    """`found`, the tensors of a folder, with those of experts put together under `names` (as transformers' model has
    them), each with its number of experts. Others keep their names.

    Raises ValueError, naming it, for a missing tensor and for one of another shape or dtype than its neighbours.
    """
    tensors: dict[str, Any] = {_of_model(name): tensor for name, tensor in found.items()}
    for name, experts in names.items():
        if name in tensors:
            continue
        prefix, kind = name.rsplit(".experts.", 1)
        own = [[f"{prefix}.experts.{n}.{p}.weight" for p in _PROJECTIONS[f"experts.{kind}"]] for n in range(experts)]
        every = [part for parts in own for part in parts]
        missing = [part for part in every if part not in tensors]
        if len(missing) == len(every):
            continue  # named by the caller, which compares all names
        if missing:
            raise ValueError(f"{missing[0]} is missing: a layer has {experts} experts")
        like = tensors[every[0]]
        for part in every:
            if (tensors[part].shape, tensors[part].dtype) != (like.shape, like.dtype):
                raise ValueError(
                    f"{part} is {tensors[part].dtype} {tensors[part].shape}, and {every[0]} {like.dtype} {like.shape}"
                )
        tensors[name] = StackedTensor(tuple(tuple(tensors.pop(part) for part in parts) for parts in own))
    return tensors


def _of_model(name: str) -> str:
    """The name in transformers' model of a file's tensor."""
    if not (match := _OF_MIXTRAL.fullmatch(name)):
        return name
    words = {theirs: ours for ours, theirs in _OTHER_PROJECTIONS["mixtral"].items()}
    return ".".join([match[1], "mlp", *(words.get(part, part) for part in match[2].split("."))])


def file_name(name: str, family: str) -> str:
    """The name in files of the tensor that transformers' model of the `family` calls `name`: of a layer's router."""
    block = _OTHER_BLOCK.get(family)
    return name if block is None or ".mlp." not in name else name.replace(".mlp.", f".{block}.")


def apart(name: str, theirs: str, shape: tuple[int, ...], family: str) -> Exported:
    """Our stacked parameter `name`, called `theirs` by transformers' model, as one tensor for each matrix."""
    prefix, kind = theirs.rsplit(".experts.", 1)
    words = _OTHER_PROJECTIONS.get(family, {})
    projections = [words.get(word, word) for word in _PROJECTIONS[f"experts.{kind}"]]
    experts, rows, columns = shape
    of_experts = [
        [file_name(f"{prefix}.experts.{number}.{projection}.weight", family) for projection in projections]
        for number in range(experts)
    ]
    size = rows // len(projections)

    def convert(values: list[Tensor]) -> dict[str, Tensor]:
        return {
            file: part
            for files, matrix in zip(of_experts, values[0], strict=True)
            for file, part in zip(files, matrix.split(size), strict=True)
        }

    return Exported((name,), {file: (size, columns) for files in of_experts for file in files}, convert)
