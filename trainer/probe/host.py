"""A machine as the system describes it: clock, versions, limits, network interfaces."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import statistics
import time
from contextlib import suppress
from pathlib import Path

import torch

import stoker
from stoker.parallel.mesh import Mesh
from stoker.trainer.probe.facts import Host, Interface
from stoker.trainer.probe.gpu_health import gpus

PACKAGES = ("transformers", "tokenizers", "safetensors", "datasets", "numpy", "deepspeed", "pyarrow")
READINGS = 7  # of the clocks
_NETWORK, _INFINIBAND = Path("/sys/class/net"), Path("/sys/class/infiniband")
_VIRTUAL = ("docker", "br-", "virbr", "tun", "tap", "dummy", "bond_slave")


def clock_ahead(mesh: Mesh) -> float:
    """Seconds that this rank's clock is ahead of rank 0's. A collective on the control group.

    All read their clocks as they leave a collective; the median of several readings keeps out ranks that were held up.
    """
    found = []
    for _ in range(READINGS):
        mesh.any([False])
        now = time.time()
        times = [float(text) for text in mesh.all_gather_text(repr(now))]
        found.append(now - times[0])
    return statistics.median(found)


def versions() -> dict[str, str]:
    """Of what computes, by name."""
    found = {"stoker": stoker.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available() and hasattr(torch.cuda, "nccl"):
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def this_host() -> Host:
    """What limits the ranks of this machine."""
    memlock, files = (
        _unless_unlimited(resource.getrlimit(which)[0]) for which in (resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE)
    )
    return Host(
        cores=len(os.sched_getaffinity(0)),
        shm_bytes=shm_bytes(),
        memlock=memlock,
        open_files=files,
        interfaces=interfaces(),
        gpus=gpus(),
        visible=torch.cuda.device_count(),
    )


def shm_bytes() -> int | None:
    """The size of /dev/shm; None without one."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def interfaces(network: Path = _NETWORK, infiniband: Path = _INFINIBAND) -> list[Interface]:
    """Network interfaces and InfiniBand ports, without loopback and those that lead to this machine only."""
    found = []
    for folder in sorted(network.glob("*")):
        if folder.name != "lo" and not folder.name.startswith(_VIRTUAL):
            speed = _text(folder / "speed")
            rate = int(speed) / 1000 if speed.lstrip("-").isdecimal() and int(speed) > 0 else None
            found.append(Interface(folder.name, "ethernet", _text(folder / "operstate") == "up", rate))
    for port in sorted(infiniband.glob("*/ports/*")):
        name = f"{port.parent.parent.name}:{port.name}"
        words = _text(port / "rate").split()
        rate = float(words[0]) if words and words[0].replace(".", "", 1).isdecimal() else None
        found.append(Interface(name, "infiniband", "ACTIVE" in _text(port / "state"), rate))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # speed of an interface that is down
        return ""


def _unless_unlimited(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit
