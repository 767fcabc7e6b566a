"""Folders of torch.distributed.checkpoint (DCP): `.metadata`, and `.distcp` files with the chunks of each tensor."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from stoker.checkpoint.tiling import tiling_problem
from stoker.launch.importing.hugging_face_bin import hugging_face_source
from stoker.launch.importing.pickled import Record, description, tensor_in
from stoker.launch.importing.source import Moments, Source, SourceTensor, config_of, reading_moments, with_moments
from stoker.launch.importing.torchtitan import EMBEDDING, torchtitan_source
from stoker.parallel.dtypes import DTYPE_NAMES
from stoker.parallel.shards import Chunk, whole
from stoker.trainer.pretrained_moments import MOMENTS, STEP

METADATA = ".metadata"
# What trainers keep beside a model, by the first part of its name.
_BESIDE = ("optimizer", "optim", "lr_scheduler", "dataloader", "train_state", "ft_manager", "step")

_STATE = re.compile(r"(optimizer|optim)\.state\.(.+)\.([a-z_]+)")  # of a parameter, by torch's own flat names


@dataclass(frozen=True)
class _Stored:
    """A chunk, and its bytes in a file."""

    chunk: Chunk
    file: Path
    offset: int
    length: int


def open_dcp(folder: Path, config: str | None, wanted: bool = True) -> Source:
    """The model in `folder`, under torchtitan's names or Hugging Face's, and its moments if they are `wanted`.

    Raises ValueError for what is damaged or incomplete, and for tensors of another kind.
    """
    values = config_of(folder, config)
    tensors, others = dcp_tensors(folder)
    moments = None
    if wanted:
        with reading_moments():
            moments, others = dcp_moments(folder, others)
    for prefix in ("model.", ""):  # a state dict below a key of its own, or alone
        inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if EMBEDDING in inner:
            outside = [name for name in tensors if not name.startswith(prefix)]
            if outside:
                raise ValueError(f"{folder / METADATA}: {outside[0]} is not below {prefix}, as other tensors are")
            what = f"{folder.name} of torchtitan"
            source = torchtitan_source(what, values, inner, others)
            return with_moments(source, moments, functools.partial(torchtitan_source, what, values))
    if tensors and all(name.startswith(("model.model.", "model.lm_head.")) for name in tensors):
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    what = f"{folder.name} of torch.distributed.checkpoint"
    source = hugging_face_source(what, values, tensors, others)
    return with_moments(source, moments, functools.partial(hugging_face_source, what, values))


def dcp_tensors(folder: Path) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """The tensors of a model by name, and the kinds of what else the folder holds.

    Raises ValueError for what is damaged or incomplete.
    """
    found, others = {}, set()
    with _records(folder / METADATA):
        for name, tensor in _listed(folder):
            kind = name.partition(".")[0].partition("/")[0]
            if "._extra_state" in name:  # of Transformer Engine's float8, in Megatron's checkpoints
                continue
            if kind in _BESIDE or kind.startswith("chained_") or tensor is None:
                others.add(kind)
            else:
                found[name] = tensor()
    if not found:
        raise ValueError(f"{folder / METADATA} lists no tensors of a model")
    return found, tuple(sorted(others))


def dcp_moments(folder: Path, others: tuple[str, ...]) -> tuple[Moments | None, tuple[str, ...]]:
    """The state of AdamW by the source's own names of parameters, and `others`, which lacks then what holds it.

    None where parameters have no such state, or another. Raises ValueError for what is damaged or incomplete.
    """
    states: dict[str, dict[str, SourceTensor | None]] = {}
    kinds = set()
    with _records(folder / METADATA):
        for name, tensor in _listed(folder):
            match = _STATE.fullmatch(name)
            if match is not None:
                kinds.add(match[1])
                states.setdefault(match[2], {})[match[3]] = None if tensor is None else tensor()
    counts = {_count(state.pop(STEP, None)) for state in states.values()}
    by_key = {
        key: {name: held for name, state in states.items() if (held := state.pop(key, None)) is not None}
        for key in MOMENTS
    }
    whole_state = all(held.keys() == states.keys() for held in by_key.values()) and not any(states.values())
    step = counts.pop() if len(counts) == 1 else None
    if step is None or not whole_state:
        return None, others
    return Moments(step, by_key), tuple(kind for kind in others if kind not in kinds)


def _count(tensor: SourceTensor | None) -> int | None:
    """The number of updates in the tensor of a step, None where it is none."""
    value = float(tensor.load()) if tensor is not None and math.prod(tensor.shape) == 1 else 0.0
    return int(value) if value.is_integer() and value >= 1 else None


def _listed(folder: Path) -> Iterator[tuple[str, Callable[[], SourceTensor] | None]]:
    """What a folder lists, by name: how to open a tensor, and None for what is none."""
    held = description(folder / METADATA)
    places = {_place_of(index): info for index, info in held.storage_data.items()}
    for name, entry in held.state_dict_metadata.items():
        if isinstance(name, str):
            is_tensor = type(entry).__name__ == "TensorStorageMetadata"
            yield name, functools.partial(_tensor, folder, name, entry, places) if is_tensor else None


@contextmanager
def _records(path: Path) -> Iterator[None]:
    """Raises ValueError where the records inside have another form than a description's."""
    try:
        yield
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{path} does not describe a checkpoint of torch {torch.__version__}: {error}") from error


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
        part = tensor_in(one.file, name, one.offset, one.length)
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
