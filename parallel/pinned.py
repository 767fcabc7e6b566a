"""Page-locked memory of the host, between which and a GPU copies run beside the GPU's work.

torch's allocator rounds a block of it up to a power of two: 18 GiB of offloaded parameters would lock 32. Here memory
is mapped, touched and registered as it is, once, and released with the last tensor that looks into it.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

_PAGE_BYTES = mmap.PAGESIZE


class _Mapping(mmap.mmap):
    """Can be referred to weakly."""


def pinned_zeros(size: int | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros in page-locked memory. Raises RuntimeError where the system refuses to lock as much."""
    shape = (size,) if isinstance(size, int) else tuple(size)
    count = math.prod(shape)
    length = max(1, -(-count * dtype.itemsize // _PAGE_BYTES)) * _PAGE_BYTES
    mapping = _Mapping(-1, length)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)  # a refusal has no effect
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    address = memory.data_ptr()
    memory.zero_()  # a page that exists is locked several times faster
    error = int(torch.cuda.cudart().cudaHostRegister(address, length, 0))
    if error:
        raise RuntimeError(
            f"{length:,} bytes of the host's memory could not be locked for copies to the GPU: CUDA error {error}; is "
            "there as much free memory in this machine or container?"
        )
    # Runs before the memory is unmapped, which is after the last tensor over it is gone; not at the process's end, when
    # CUDA may be gone already.
    weakref.finalize(mapping, _unregister, address).atexit = False
    return memory[: count * dtype.itemsize].view(dtype).view(shape)


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
