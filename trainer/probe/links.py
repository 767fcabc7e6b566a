"""Messages between ranks: collectives over each axis, and from machine to machine.

A collective is timed as a step has it, after a product on every rank, whose own time is taken off: ranks come at
different times, and on CPUs the threads that carry messages share the cores. A message's time is fitted as
latency + bytes / rate by least squares, every point weighted by 1 / time**2: small and large messages count alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from stoker.parallel.layout import AXES
from stoker.parallel.mesh import Mesh
from stoker.trainer.probe.facts import AxisLink, Line, Link
from stoker.trainer.probe.products import of_all_ranks, synchronize, timed

SIZES = tuple(32 << 10 << 3 * power for power in range(6))  # 32 KiB to 1 GiB
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")  # of every axis but pp's, whose ranks send
REPEATS = 5
AXIS_REPEATS = 3
PAIR_SIZES = (32 << 10, 1 << 20, 8 << 20, 64 << 20)
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.13
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_PING = 4  # bytes
_BETWEEN = {"cuda": 2048, "cpu": 256}  # size of the square matrices that are multiplied before each message
_SEEN = 0.1  # of the time of product and message: a shorter message is lost in noise
_SPAN = 0.02  # seconds of small messages in a row


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """The line through (bytes, seconds) of least squared relative error, with a latency of at least 0."""
    rows = [(x, t, 1 / t**2) for x, t in points]
    w, wx, wt = (sum(each) for each in zip(*((w, w * x, w * t) for x, t, w in rows), strict=True))
    wxx, wxt = sum(w * x * x for x, _, w in rows), sum(w * x * t for x, t, w in rows)
    spread = w * wxx - wx * wx
    slope = (w * wxt - wx * wt) / spread if spread > 0 else 0.0
    latency = (wt - slope * wx) / w
    if latency < 0:
        slope, latency = wxt / wxx, 0.0
    if slope <= 0:  # noise: the largest message has no more than its bytes over its time
        largest, seconds = max(points)
        return Line(max(0.0, latency), largest / seconds)
    return Line(latency, 1 / slope)


def rounds(members: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Pairs of `members`: each pair once, in rounds in which none is in two pairs (the circle method)."""
    places: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    half = len(places) // 2
    for _ in range(len(places) - 1):
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(a, b) for a, b in pairs if a is not None and b is not None]
        places = [places[0], places[-1], *places[1:-1]]


def axis_links(mesh: Mesh, most_bytes: int, most_seconds: float) -> list[AxisLink]:
    """Of every axis of more than one rank, up to messages of `most_bytes`, each axis in about `most_seconds`.

    A collective of all ranks.
    """
    return [
        _axis(mesh, axis, kind, most_bytes, most_seconds if axis == "pp" else most_seconds / len(KINDS))
        for axis in AXES
        if getattr(mesh.layout, axis) > 1
        for kind in (("send",) if axis == "pp" else KINDS)
    ]


def ring_share(kind: str, ranks: int) -> float:
    """Of a message's bytes, what one link of a ring of `ranks` carries."""
    times = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
    return times[kind] * (ranks - 1) / ranks if kind in times else 1.0


def _axis(mesh: Mesh, axis: str, kind: str, most_bytes: int, most_seconds: float) -> AxisLink:
    ranks = next(ranks for ranks in mesh.layout.groups(axis) if mesh.rank in ranks)
    group, number = mesh.group(axis), len(ranks)
    share = ring_share(kind, number)
    a = torch.ones(_BETWEEN[mesh.device.type], _BETWEEN[mesh.device.type], device=mesh.device)
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, a, out=out)

    multiply()
    points: list[tuple[float, float]] = []
    largest, spent = 0, 0.0
    for size in (size for size in SIZES if size <= most_bytes):
        act = _collective(kind, size // 4 // number * number, group, ranks, mesh)

        def both(act: Callable[[], object] = act) -> None:
            multiply()
            act()

        both()
        once = max(of_all_ranks(mesh, [timed(both, 1, mesh.device)])[0])
        if points and spent + 2 * once * AXIS_REPEATS > most_seconds:
            break
        count = max(1, min(50, int(_SPAN / once)))
        times = []
        for _ in range(AXIS_REPEATS):
            for each in (multiply, both):
                mesh.any([False])
                times.append(timed(each, count, mesh.device))
        gathered = of_all_ranks(mesh, times)
        spent += once + sum(max(each) for each in gathered) * count
        slowest = [max(each[rank] for rank in ranks) for each in gathered]
        pairs = list(zip(slowest[::2], slowest[1::2], strict=True))
        more = (max(_SEEN * with_message, with_message - alone) for alone, with_message in pairs)
        points.append((size * share, statistics.median(more)))
        largest = size
    return AxisLink(axis, kind, list(ranks), fit(points), largest)


def _collective(
    kind: str, elements: int, group: dist.ProcessGroup | None, ranks: Sequence[int], mesh: Mesh
) -> Callable[[], object]:
    data = torch.zeros(elements, device=mesh.device)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(data, group=group)
    own = torch.zeros(elements // len(ranks), device=mesh.device)
    if kind == "all_gather":
        return lambda: _ALL_GATHER(data, own, group=group)
    if kind == "reduce_scatter":
        return lambda: _REDUCE_SCATTER(own, data, group=group)
    if kind == "all_to_all":
        exchanged = torch.empty_like(data)
        return lambda: dist.all_to_all_single(exchanged, data, group=group)
    place, taken = ranks.index(mesh.rank), torch.zeros_like(data)
    after, before = ranks[(place + 1) % len(ranks)], ranks[place - 1]

    def shift() -> None:
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, data, after, group), dist.P2POp(dist.irecv, taken, before, group)]
        )
        for work in works:
            work.wait()

    return shift


def machine_links(
    mesh: Mesh, first_ranks: Sequence[int], most_bytes: int, most_seconds: float, most_rounds: int | None = None
) -> list[Link]:
    """From this rank, if it is one of `first_ranks`, to the others of them. A collective of all ranks.

    Pairs that share no machine run at the same time. `most_rounds` limits how many others each is tried with.
    """
    found = []
    for number, pairs in enumerate(rounds(first_ranks)):
        if most_rounds is not None and number >= most_rounds:
            break
        mesh.any([False])
        for a, b in pairs:
            if mesh.rank not in (a, b):
                continue
            for sender, receiver in ((a, b), (b, a)):
                if mesh.rank == sender:
                    found.append(Link(receiver, _send(mesh, receiver, most_bytes, most_seconds)))
                else:
                    _receive(mesh, sender)
    mesh.any([False])
    return found


def _send(mesh: Mesh, to: int, most_bytes: int, most_seconds: float) -> Line:
    """Each message is answered by one number. The latency is half of the fastest exchange of single numbers: what a fit
    makes of larger messages on a busy host is less certain."""
    header, answer = torch.zeros(1, dtype=torch.int64, device=mesh.device), torch.zeros(1, device=mesh.device)
    points: list[tuple[float, float]] = []
    spent = 0.0
    for size in (_PING, *(size for size in PAIR_SIZES if size <= most_bytes)):
        header.fill_(size)
        dist.send(header, to, group=mesh.world)
        data, best = torch.zeros(size // 4, device=mesh.device), float("inf")
        for turn in range(1 + _turns(size)):
            began = time.perf_counter()
            dist.send(data, to, group=mesh.world)
            dist.recv(answer, to, group=mesh.world)
            synchronize(mesh.device)
            once = time.perf_counter() - began
            spent += once
            if turn:  # the first may have to connect
                best = min(best, once)
        points.append((float(size), best))
        if len(points) > 1 and spent + best * 8 * REPEATS > most_seconds:
            break
    header.fill_(0)
    dist.send(header, to, group=mesh.world)
    return Line(points[0][1] / 2, fit(points[1:]).rate)


def _turns(size: int) -> int:
    return 4 * REPEATS if size == _PING else REPEATS


def _receive(mesh: Mesh, sender: int) -> None:
    header, answer = torch.zeros(1, dtype=torch.int64, device=mesh.device), torch.zeros(1, device=mesh.device)
    while True:
        dist.recv(header, sender, group=mesh.world)
        if not (size := int(header)):
            return
        data = torch.zeros(size // 4, device=mesh.device)
        for _ in range(1 + _turns(size)):
            dist.recv(data, sender, group=mesh.world)
            dist.send(answer, sender, group=mesh.world)
