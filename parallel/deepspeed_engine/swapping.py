"""Compute parameters on NVMe: what DeepSpeed's swapper (ZeRO 3) needs of a machine.

It keeps a file for each parameter in a folder, and buffers that are locked in memory. Where the disk is full or memory
may not be locked it aborts the process, so both are tried beforehand.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stoker.conf.scratch import Scratch
from stoker.parallel.mesh import Mesh

PREFIX = "stoker-swap-"
LEAST_BYTES = 1 << 20  # DeepSpeed leaves a part of a parameter that is smaller in memory
SLACK_BYTES = 1 << 16  # what it rounds a part up by is less


def swap_folder(parent: Path) -> Scratch:
    """A private folder under `parallel.nvme_path`. Raises ValueError when the disk cannot be written."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Scratch(PREFIX, parent)
    except OSError as error:
        raise ValueError(f"parallel.nvme_path={parent}: {error.strerror}") from None


def swapped_bytes(model: nn.Module, ranks: int) -> list[int]:
    """The sizes of this rank's parts of parameters that go to the disk, one for each."""
    parts = [-(-parameter.numel() // ranks) * parameter.element_size() for parameter in model.parameters()]
    return [part + SLACK_BYTES for part in parts if part >= LEAST_BYTES]


def require_room(folder: Path, needed: int, mesh: Mesh) -> None:
    """Raises ValueError, on all ranks alike, unless their disks have room for the `needed` bytes of each of them."""
    reason = ""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(1, needed))
        except OSError as error:
            reason = f"parallel.nvme_path={folder.parent}: no room for {needed:,} bytes: {error.strerror}"
        reasons = [found for found in mesh.all_gather_text(reason) if found]  # all ranks reserve at the same time
    if reasons:
        raise ValueError(reasons[0])


def require_lockable(needed: int) -> None:
    """Raises ValueError unless this process may lock `needed` bytes in memory."""
    libc: Any = ctypes.CDLL(None)
    try:
        with mmap.mmap(-1, needed) as memory:
            first = ctypes.c_char.from_buffer(memory)
            refused = libc.mlock(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(needed)) != 0
            del first  # or the mapping could not be closed
    except OSError:
        refused = True
    if refused:
        raise ValueError(
            f"parallel.offload=nvme: DeepSpeed locks {needed:,} bytes of memory as buffers, and this process may not: "
            "raise the limit (ulimit -l; memlock in Docker and Slurm), or set parallel.deepspeed.zero_optimization."
            "offload_param.buffer_count and sub_group_size lower"
        )


def keep_in_memory(parameter: Any) -> None:
    """Take a parameter's part from the swapper, which writes back only what is trained."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    part = parameter.ds_tensor
    if part.status == PartitionedParamStatus.NOT_AVAILABLE:
        part.data = torch.zeros(part.ds_numel, dtype=parameter.dtype)
        part.status, part.final_location = PartitionedParamStatus.AVAILABLE, None
