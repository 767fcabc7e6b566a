"""Safetensors files written one tensor at a time, in any order, byte for byte as the safetensors library lays them out.

The library itself needs all tensors of a file in memory. (Format: 8 bytes of header length, a JSON header, the data.)
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.checkpoint.format import safetensors_entries, safetensors_frame
from stoker.conf.values import ConfigError
from stoker.parallel.dtypes import DTYPE_NAMES

_SIZE = re.compile(r"(\d+)\s*(KB|MB|GB)", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

# The order of tensors in a file: first by dtype, as the library has it, then by name.
_ORDER = (
    torch.int64,
    torch.float64,
    torch.float32,
    torch.int32,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.bool,
)


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def data_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """One file, and its tensors by name."""

    name: str
    tensors: Mapping[str, Planned]

    @property
    def data_bytes(self) -> int:
        """Of tensors."""
        return sum(tensor.data_bytes for tensor in self.tensors.values())

    def layout(self) -> tuple[bytes, dict[str, int]]:
        """The first bytes of the file, and where each tensor begins in it."""
        ordered = sorted(self.tensors.items(), key=lambda item: (_ORDER.index(item[1].dtype), item[0]))
        entries = safetensors_entries(
            (name, DTYPE_NAMES[tensor.dtype], tensor.shape, tensor.data_bytes) for name, tensor in ordered
        )
        header = {"__metadata__": {"format": "pt"}, **entries}
        frame = safetensors_frame(json.dumps(header, separators=(",", ":")).encode())
        return frame, {name: len(frame) + entry["data_offsets"][0] for name, entry in entries.items()}


def plan_files(tensors: Mapping[str, Planned], file_bytes: int) -> list[TensorFile]:
    """Files of at most `file_bytes` of tensors, or of one tensor, named as transformers names them."""
    groups: list[dict[str, Planned]] = [{}]
    held = 0
    for name, tensor in sorted(tensors.items()):
        if groups[-1] and held + tensor.data_bytes > file_bytes:
            groups.append({})
            held = 0
        groups[-1][name] = tensor
        held += tensor.data_bytes
    if len(groups) == 1:
        return [TensorFile("model.safetensors", groups[0])]
    names = (f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1))
    return [TensorFile(name, group) for name, group in zip(names, groups, strict=True)]


def index_json(files: list[TensorFile], parameters: int) -> dict[str, Any]:
    """The contents of model.safetensors.index.json for several files. `parameters` counts numbers, without buffers."""
    where = {name: file.name for file in files for name in file.tensors}
    counts = {"total_parameters": parameters, "total_size": sum(file.data_bytes for file in files)}
    return {"metadata": counts, "weight_map": dict(sorted(where.items()))}


def file_bytes_of(size: str) -> int:
    """The bytes of `--shard-size`. Raises ConfigError."""
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ConfigError(f"--shard-size={size}: expected a size such as 500MB or 5GB")
    return int(match[1]) * _UNITS[match[2].upper()]


@contextmanager
def made_whole(out: str) -> Iterator[Path]:
    """A folder to fill, which becomes `out` if nothing is raised. Raises ConfigError for one that is not empty."""
    target = Path(out).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty directory: name another")
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a command that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(target)  # replaces at most an empty directory
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class TensorWriter:
    """Writes tensors at their places in `files`. Used as a context, which syncs and closes the files."""

    def __init__(self, folder: Path, files: list[TensorFile]) -> None:
        self._descriptors: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}  # descriptor and offset
        for file in files:
            descriptor = os.open(folder / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._descriptors.append(descriptor)
            header, starts = file.layout()
            _write(descriptor, memoryview(header), 0)
            self._places |= {name: (descriptor, start) for name, start in starts.items()}

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors:
            os.fsync(descriptor)
            os.close(descriptor)

    def write(self, name: str, value: Tensor) -> int:
        """Write one tensor, of the planned shape and dtype; how many bytes it has."""
        data = value.contiguous().flatten().view(torch.uint8).numpy().data
        descriptor, start = self._places[name]
        _write(descriptor, data, start)
        return len(data)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
