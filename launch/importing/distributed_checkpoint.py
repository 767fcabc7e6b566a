"""Folders of torch.distributed.checkpoint (DCP): `.metadata`, and `.distcp` files with the chunks of each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from stoker.checkpoint.tiling import tiling_problem
from stoker.launch.importing.hugging_face_bin import hugging_face_source
from stoker.launch.importing.pickled import Record, description, tensor_in
from stoker.launch.importing.source import Source, SourceTensor, config_of
from stoker.launch.importing.torchtitan import EMBEDDING, torchtitan_source
from stoker.parallel.dtypes import DTYPE_NAMES
from stoker.parallel.shards import Chunk, whole

METADATA = ".metadata"
# What trainers keep beside a model, by the first part of its name.
_BESIDE = ("optimizer", "optim", "lr_scheduler", "dataloader", "train_state", "ft_manager", "step")


@dataclass(frozen=True)
class _Stored:
    """A chunk, and its bytes in a file."""

    chunk: Chunk
    file: Path
    offset: int
    length: int


def open_dcp(folder: Path, config: str | None) -> Source:
    """The model in `folder`, under torchtitan's names or Hugging Face's.

    Raises ValueError for what is damaged or incomplete, and for tensors of another kind.
    """
    values = config_of(folder, config)
    tensors, others = dcp_tensors(folder)
    for prefix in ("model.", ""):  # a state dict below a key of its own, or alone
        inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if EMBEDDING in inner:
            outside = [name for name in tensors if not name.startswith(prefix)]
            if outside:
                raise ValueError(f"{folder / METADATA}: {outside[0]} is not below {prefix}, as other tensors are")
            return torchtitan_source(f"{folder.name} of torchtitan", values, inner, others)
    if tensors and all(name.startswith(("model.model.", "model.lm_head.")) for name in tensors):
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return hugging_face_source(f"{folder.name} of torch.distributed.checkpoint", values, tensors, others)


def dcp_tensors(folder: Path) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """The tensors of a model by name, and the kinds of what else the folder holds.

    Raises ValueError for what is damaged or incomplete.
    """
    path = folder / METADATA
    try:
        held = description(path)
        listed = {name: entry for name, entry in held.state_dict_metadata.items() if isinstance(name, str)}
        places = {_place_of(index): info for index, info in held.storage_data.items()}
        found, others = {}, set()
        for name, entry in listed.items():
            kind = name.partition(".")[0].partition("/")[0]
            if "._extra_state" in name:  # of Transformer Engine's float8, in Megatron's checkpoints
                continue
            if kind in _BESIDE or kind.startswith("chained_") or type(entry).__name__ != "TensorStorageMetadata":
                others.add(kind)
            else:
                found[name] = _tensor(folder, name, entry, places)
    except (AttributeError, TypeError, KeyError, IndexError) as error:  # records of another form
        raise ValueError(f"{path} does not describe a checkpoint of torch {torch.__version__}: {error}") from error
    if not found:
        raise ValueError(f"{path} lists no tensors of a model")
    return found, tuple(sorted(others))


def _tensor(folder: Path, name: str, entry: Any, places: dict[tuple[str, tuple[int, ...]], Any]) -> SourceTensor:
    shape, dtype = _numbers(entry.size), entry.properties.state[0]
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPE_NAMES:
        raise ValueError(f"{folder / METADATA}: {name} is {dtype}: quantised weights are not read")
    stored = []
    for record in entry.chunks:
        chunk = Chunk(_numbers(record.offsets), _numbers(record.sizes))
        info = places.get((name, chunk.offsets))
        if info is None:
            raise ValueError(f"{folder / METADATA}: no file has {name} at {chunk.offsets}")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{folder / METADATA}: {name} is transformed by {info.transform_descriptors!s:.80}")
        stored.append(_Stored(chunk, _file(folder, info.relative_path), *_numbers_of(info.offset, info.length)))
    chunks = [one.chunk for one in stored]
    inside = all(_is_inside(chunk, shape) for chunk in chunks)
    problem = tiling_problem(shape, chunks) if inside else "a chunk lies outside"
    if problem:
        raise ValueError(f"{folder / METADATA}: {name} of shape {shape} is incomplete: {problem}")

    def part(chunk: Chunk) -> Tensor:
        return _read(name, chunk, dtype, stored)

    return SourceTensor(stored[0].file, shape, DTYPE_NAMES[dtype], lambda: part(whole(shape)), part)


def _read(name: str, wanted: Chunk, dtype: torch.dtype, stored: Sequence[_Stored]) -> Tensor:
    """The values in the chunk `wanted` of a tensor, from the `stored` chunks that have some of them."""
    value = torch.empty(wanted.sizes, dtype=dtype)
    for one in stored:
        common = one.chunk.intersection(wanted)
        if common is None:
            continue
        part = tensor_in(one.file, one.offset, one.length)
        if tuple(part.shape) == one.chunk.sizes[1:] and one.chunk.sizes[:1] == (1,):
            part = part[None]  # a layer of Megatron's
        if tuple(part.shape) != one.chunk.sizes or part.dtype != dtype:
            raise ValueError(
                f"{one.file}: {name} at {one.chunk.offsets} is {tuple(part.shape)} {part.dtype}; {METADATA} has "
                f"{one.chunk.sizes} {dtype}"
            )
        value[common.within(wanted)] = part[common.within(one.chunk)]
    return value


def _place_of(index: Any) -> tuple[str, tuple[int, ...]]:
    """The key of a chunk: its tensor's name and where it begins. What is no tensor begins nowhere."""
    offset = getattr(index, "offset", None)
    return index.fqn, () if offset is None else _numbers(offset)


def _file(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or PurePath(name).name != name or not name.endswith(".distcp"):
        raise ValueError(f"{folder / METADATA} names the file {name!s:.80}: not a .distcp file of this folder")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{folder / METADATA} names {name}, which is no file of the folder")
    return path


def _numbers(size: Any) -> tuple[int, ...]:
    """The numbers of a torch.Size."""
    if not isinstance(size, Record):
        raise TypeError(f"{size!s:.80} is no torch.Size")
    return _numbers_of(*size.made_of[0])


def _numbers_of(*values: Any) -> tuple[int, ...]:
    if any(type(value) is not int or not 0 <= value < 1 << 62 for value in values):
        raise TypeError(f"{values!s:.80} are no sizes")
    return values


def _is_inside(chunk: Chunk, shape: tuple[int, ...]) -> bool:
    if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
        return False
    return all(start + size <= end for start, size, end in zip(chunk.offsets, chunk.sizes, shape, strict=True))
