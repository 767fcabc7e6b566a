"""How much memory this process has taken, and how much it may still take."""

from __future__ import annotations

from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far: of torch's allocations on a GPU, else of resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        peak = _STATUS.read_bytes().partition(b"VmHWM:")[2].split(maxsplit=1)[0]
    except (OSError, IndexError):  # not Linux
        return 0
    return int(peak) * 1024


def available_bytes() -> int | None:
    """Bytes of memory that are free, or can be freed, on this machine and in this container; None where unknown."""
    bounds = [bound for bound in (_of_machine(), _of_container()) if bound is not None]
    return min(bounds, default=None)


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    for line in lines:
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _of_container() -> int | None:
    """What the control group leaves, its file cache counted as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or the older kind of control group
        return None
    return None if limit == "max" else int(limit) - used + int(cached.get("inactive_file", 0))
