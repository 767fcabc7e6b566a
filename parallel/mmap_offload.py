"""Memory mapped from files: what `parallel.offload=nvme` keeps on a disk.

`MappedMemory` is a mode of torch's dispatcher. While it is on, every large tensor that is made in the CPU's memory
is a shared mapping of a file instead, without changes to the code that makes it: DeepSpeed's masters and gradients,
the state of any torch optimizer, the staging pool of a checkpoint. They stay plain tensors, and the arithmetic is the
same to the last bit; the kernel keeps as many of their pages in memory as there is room for and writes the others to
the disk.

A file never has a name, so none is left behind when the process is killed, and none is shared between ranks or runs.
Its blocks are allocated before it is mapped: a full disk is an error here, not a SIGBUS in a later step.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stoker.conf.schema import ParallelConfig

LARGE_BYTES = 1 << 20  # what is smaller is not worth a file

aten = torch.ops.aten
_FROM_SIZE = (aten.empty.memory_format, aten.zeros.default)
_FROM_SHAPE_OF = (aten.empty_like.default, aten.zeros_like.default)
_FROM_VALUES_OF = (aten.clone.default, aten._to_copy.default)


class MappedMemory(TorchDispatchMode):
    """`with MappedMemory(folder):` large CPU tensors that this thread makes are files on the disk of `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _FROM_SIZE:
            size, dtype, device = args[0], torch.get_default_dtype(), torch.device("cpu")
        elif function in _FROM_SHAPE_OF or function in _FROM_VALUES_OF:
            size, dtype, device = args[0].shape, args[0].dtype, args[0].device
        else:
            return function(*args, **kwargs)
        dtype, device = kwargs.get("dtype") or dtype, torch.device(kwargs.get("device") or device)
        if device.type != "cpu" or kwargs.get("pin_memory") or math.prod(size) * dtype.itemsize < LARGE_BYTES:
            return function(*args, **kwargs)
        made = self._zeros(size, dtype)
        return made.copy_(args[0]) if function in _FROM_VALUES_OF else made

    def _zeros(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(size)
        try:
            with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
                name = f"/proc/self/fd/{file.fileno()}"
                return torch.from_file(name, shared=True, size=count, dtype=dtype).view(tuple(size))
        except OSError as error:
            raise ValueError(
                f"parallel.nvme_path={self._folder}: no room for {count * dtype.itemsize:,} bytes: {error.strerror}"
            ) from None


def offloaded(parallel: ParallelConfig) -> AbstractContextManager[Any]:
    """A context in which large tensors of the CPU's memory are made in files if `parallel.offload` is nvme.

    Raises ValueError inside it when the disk is full or cannot be written.
    """
    if parallel.offload != "nvme":
        return nullcontext()
    assert parallel.nvme_path is not None, "refused"
    folder = Path(parallel.nvme_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"parallel.nvme_path={folder}: {error.strerror}") from None
    return MappedMemory(folder)
