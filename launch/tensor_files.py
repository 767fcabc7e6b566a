"""Safetensors files written one tensor at a time, in any order, byte for byte as the safetensors library lays them out.

The library itself needs all tensors of a file in memory. (Format: 8 bytes of header length, a JSON header, the data.)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.checkpoint.format import safetensors_entries, safetensors_frame

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorFile:
    """One file: its tensors one after the other, sorted by name, all of one dtype of `element` bytes."""

    name: str
    shapes: Mapping[str, Shape]
    dtype: str  # by the format's names: F32, BF16, F16
    element: int

    @property
    def data_bytes(self) -> int:
        """Of tensors."""
        return self.element * sum(math.prod(shape) for shape in self.shapes.values())

    def layout(self) -> tuple[bytes, dict[str, int]]:
        """The first bytes of the file, and where each tensor begins in it."""
        entries = safetensors_entries(
            (name, self.dtype, shape, self.element * math.prod(shape)) for name, shape in self.shapes.items()
        )
        header = {"__metadata__": {"format": "pt"}, **entries}
        frame = safetensors_frame(json.dumps(header, separators=(",", ":")).encode())
        return frame, {name: len(frame) + entry["data_offsets"][0] for name, entry in entries.items()}


def plan_files(shapes: Mapping[str, Shape], dtype: str, element: int, file_bytes: int) -> list[TensorFile]:
    """Files of at most `file_bytes` of tensors, or of one tensor, named as transformers names them."""
    groups: list[dict[str, Shape]] = [{}]
    held = 0
    for name, shape in sorted(shapes.items()):
        size = element * math.prod(shape)
        if groups[-1] and held + size > file_bytes:
            groups.append({})
            held = 0
        groups[-1][name] = shape
        held += size
    if len(groups) == 1:
        return [TensorFile("model.safetensors", groups[0], dtype, element)]
    names = (f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1))
    return [TensorFile(name, group, dtype, element) for name, group in zip(names, groups, strict=True)]


def index_json(files: list[TensorFile]) -> dict[str, Any]:
    """The contents of model.safetensors.index.json for several files."""
    where = {name: file.name for file in files for name in file.shapes}
    total = sum(file.data_bytes for file in files)
    counts = {"total_parameters": total // files[0].element, "total_size": total}
    return {"metadata": counts, "weight_map": dict(sorted(where.items()))}


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
