"""The order in which ranks measure, all of them together."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stoker.conf.schema import Config
from stoker.data.cache import cache_root
from stoker.parallel.layout import batch_plan
from stoker.parallel.mesh import Mesh
from stoker.trainer.memory import available_bytes
from stoker.trainer.probe.facts import AxisLink, Facts, FolderRate, Line, Link, facts_of
from stoker.trainer.probe.host import clock_ahead, this_host, versions
from stoker.trainer.probe.judge import slow_ranks, unusual_links
from stoker.trainer.probe.links import axis_links, machine_links
from stoker.trainer.probe.passes import call_seconds, own_passes
from stoker.trainer.probe.products import (
    Product,
    best_rate,
    dtype_of,
    host_device_rates,
    memory_rate,
    own_rate,
    windows,
)
from stoker.trainer.probe.storage import rates_of
from stoker.trainer.runtime.process import Place

GIB = 2**30
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Effort:
    """How long each part takes, in seconds, and how much of it is measured; 0 leaves a part out."""

    windows: int = 5
    window_seconds: float = 0.4
    matrix_seconds: float = 0.0  # for each size and dtype
    sizes: Mapping[str, Sequence[int]] | None = None  # of square matrices by kind of device; default: those of products
    own_seconds: float = 0.0
    memory_seconds: float = 0.0
    call_seconds: float = 0.0
    axis_seconds: float = 0.0
    axis_bytes: int = 1 << 30
    pair_seconds: float = 1.0
    pair_bytes: int = 8 << 20
    pair_rounds: int | None = 8  # how many other machines each is tried with
    folder_seconds: float = 0.0
    folder_bytes: int = 256 << 20


FULL = Effort(
    matrix_seconds=1.0, own_seconds=4.0, memory_seconds=0.5, call_seconds=1.0, axis_seconds=8.0, pair_seconds=3.0,
    pair_bytes=64 << 20, pair_rounds=None, folder_seconds=3.0, folder_bytes=1 << 30,
)  # fmt: skip
QUICK = Effort(
    windows=5, window_seconds=0.3, matrix_seconds=0.5, sizes={"cuda": (8192,), "cpu": (256, 512)}, own_seconds=1.0,
    memory_seconds=0.2, call_seconds=0.3, axis_seconds=4.0, axis_bytes=16 << 20, folder_seconds=0.5,
    folder_bytes=64 << 20,
)  # fmt: skip
PREFLIGHT = Effort(windows=5, window_seconds=0.3, memory_seconds=0.2)


def measure(
    config: Config, mesh: Mesh, place: Place, effort: Effort, products: Sequence[Product] = (), repeats: int = 1
) -> list[Facts]:
    """What all ranks found, in their order. A collective of all ranks.

    `products` are those of the model; `repeats` stands for a slower rank in tests (`products.windows`).
    """
    device, precision = mesh.device, dtype_of(config.precision)
    first = mesh.rank - place.local_rank
    is_first = place.local_rank == 0
    clock = clock_ahead(mesh)
    found = windows(device, effort.windows, effort.window_seconds, lambda: mesh.any([False]), repeats)
    if _any_slow(mesh, found):  # as long again, so that a rank that lost its core for a moment is not named
        found += windows(device, effort.windows, effort.window_seconds, lambda: mesh.any([False]), repeats)
    peaks: dict[str, float] = {}
    if effort.matrix_seconds:
        sizes = effort.sizes[device.type] if effort.sizes is not None else ()
        for dtype in dict.fromkeys((precision, "fp32")):
            mesh.any([False])
            peaks[dtype] = best_rate(dtype, device, effort.matrix_seconds, sizes)
    own = passes = None
    if effort.own_seconds and products:
        mesh.any([False])
        own = own_rate(products, precision, device, effort.own_seconds, peaks[precision])
        mesh.any([False])
        rows, free = batch_plan(config, mesh.layout).micro_rows, _free_bytes(mesh, place)
        rate, half = peaks[precision], effort.own_seconds / 2
        passes = own_passes(config.model, precision, rows, config.seq_len, mesh, half, rate, free)
    memory = into = back = None
    if effort.memory_seconds:
        mesh.any([False])
        memory = memory_rate(device, effort.memory_seconds)
        into, back = host_device_rates(device, effort.memory_seconds)
    call = None
    if effort.call_seconds:
        mesh.any([False])
        call = call_seconds(mesh, effort.call_seconds)
    axes: list[AxisLink] = []
    if effort.axis_seconds:
        axes = axis_links(mesh, min(effort.axis_bytes, _message_bytes(mesh, place)), effort.axis_seconds)
    firsts = sorted({int(text) for text in mesh.all_gather_text(str(first))})
    links: list[Link] = []
    if len(firsts) > 1:
        pairs = effort.pair_bytes, effort.pair_seconds, effort.pair_rounds
        links = machine_links(mesh, firsts, *pairs)
        if _any_slow_link(mesh, links):
            links = [one.better(other) for one, other in zip(links, machine_links(mesh, firsts, *pairs), strict=True)]
    folders: list[FolderRate] = []
    if effort.folder_seconds and is_first:
        folders = folder_rates(config, effort)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    own_facts = Facts(
        rank=mesh.rank,
        host=socket.gethostname(),
        first=first,
        device=device_name(device),
        cuda=device.type == "cuda",
        memory_gib=_memory_gib(device, place),
        clock=clock,
        versions=versions(),
        windows=found,
        peaks=peaks,
        own=own,
        memory=memory,
        to_device=into,
        from_device=back,
        call=call,
        passes=passes,
        axes=axes,
        links=links,
        folders=folders,
        machine=this_host() if is_first else None,
    )
    return [facts_of(text) for text in mesh.all_gather_text(own_facts.text())]


def folder_rates(config: Config, effort: Effort) -> list[FolderRate]:
    """Of the data, checkpoint, cache and offload folders of this machine."""
    run = Path(str(config.run.dir or "."))
    places = {
        "checkpoints": Path(config.checkpoint.dir) if config.checkpoint.dir else run / "checkpoints",
        "cache": cache_root(config.data),
    }
    if config.parallel.offload == "nvme" and config.parallel.nvme_path is not None:
        places["offload"] = Path(config.parallel.nvme_path)
    found = []
    for path in data_paths(config):
        found += rates_of("data", path, effort.folder_bytes, effort.folder_seconds, write=False)
    for what, path in places.items():
        found += rates_of(what, path, effort.folder_bytes, effort.folder_seconds, write=True)
    return found


def data_paths(config: Config) -> list[Path]:
    """The files and folders of this machine that the run reads its data from, as far as settings name them."""
    sources = [config.data.path, *(each.get("path") for each in config.data.sources.values() if isinstance(each, dict))]
    return [path for text in sources if isinstance(text, str) and (path := Path(text).expanduser()).exists()]


def device_name(device: torch.device) -> str:
    """A GPU's name; of a CPU that of its model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        names = [line for line in CPUINFO.read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else "CPU"


def _any_slow(mesh: Mesh, own: Sequence[float]) -> bool:
    texts = mesh.all_gather_text(" ".join(map(repr, own)))
    name = device_name(mesh.device)  # ranks of several kinds of device are told apart at the end
    facts = [
        Facts(rank, "", rank, name, False, 0.0, windows=list(map(float, text.split())))
        for rank, text in enumerate(texts)
    ]
    return bool(slow_ranks(facts))


def _any_slow_link(mesh: Mesh, own: Sequence[Link]) -> bool:
    texts = mesh.all_gather_text(json.dumps([(link.to, link.line.latency, link.line.rate) for link in own]))
    lines = {(rank, to): Line(*line) for rank, text in enumerate(texts) for to, *line in json.loads(text)}
    _, slow, late = unusual_links(lines)
    return bool(slow or late)


def _memory_gib(device: torch.device, place: Place) -> float:
    """Of a GPU, or this rank's share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return (available_bytes() or 0) / GIB / place.local_world


def _message_bytes(mesh: Mesh, place: Place) -> int:
    """That leave most of the memory free, on all ranks alike."""
    return min(int(text) for text in mesh.all_gather_text(str(int(_free_bytes(mesh, place) / 8))))


def _free_bytes(mesh: Mesh, place: Place) -> float:
    """Of this rank's device, or its share of the machine's memory."""
    if mesh.device.type == "cuda":
        return float(torch.cuda.mem_get_info(mesh.device)[0])
    return (available_bytes() or GIB) / place.local_world
