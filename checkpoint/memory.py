"""Memory for the staging pool."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_PAGE_BYTES = 1 << 12
_HUGE_BYTES = 1 << 21
_MADV_HUGEPAGE = 14  # of Linux

_madvise = getattr(ctypes.CDLL(None), "madvise", None)


def fresh_bytes(size: int) -> Tensor:
    """uint8 [size], not initialised, from a page's beginning, and in huge pages where the system has them.

    Touching new memory in pages of 4 KiB takes as long as reading it from a fast disk; in pages of 2 MiB a tenth of
    that. torch allocates it, so that `stoker.parallel.mmap_offload`, which redirects torch's memory, covers it too.
    """
    boundary = _HUGE_BYTES if size >= _HUGE_BYTES else _PAGE_BYTES
    memory = torch.empty(size + boundary, dtype=torch.uint8)
    skipped = -memory.data_ptr() % boundary
    memory = memory[skipped : skipped + size]
    if _madvise is not None and size >= _HUGE_BYTES:
        _madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(size), _MADV_HUGEPAGE)  # a refusal has no effect
    return memory
