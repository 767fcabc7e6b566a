"""How much memory this process has taken, and how much it may still take."""

from __future__ import annotations

from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")
_STATUS_BYTES = 16384  # all of it


class PeakMemory:
    """The most that this process has held so far: of torch's allocations on a GPU, else of resident memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        read = device.type != "cuda" and _STATUS.exists()  # else not Linux
        self._file = _STATUS.open("rb", buffering=0) if read else None  # kept open: asked in every step

    def bytes(self) -> int:
        """0 where it is not known."""
        if self._file is None:
            return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        self._file.seek(0)
        return int(self._file.read(_STATUS_BYTES).partition(b"VmHWM:")[2].split(maxsplit=1)[0]) * 1024


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
