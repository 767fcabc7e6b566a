"""One owner for each matrix, among the ranks that hold parts of it, and the messages between owners and holders.

A *unit* is a chunk of a global parameter that must be whole to be updated: a matrix, one of several that are fused in
one parameter, or a whole parameter. Which rank holds which rectangle of a unit is known to all from one exchange when
the engine is built. Units are assigned in the order of their cost, each to the rank with the least work so far.

Where ZeRO shards parameters, the owner is one of the ranks of the same replica, so that nothing crosses replicas: every
replica computes the same. Where all data-parallel ranks hold everything (ZeRO 0), they share the work instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from stoker.parallel.mesh import Mesh
from stoker.parallel.registry import LocalShard, Registry
from stoker.parallel.shards import Chunk, whole

OWNERS = "owners"  # the group of ranks that units are assigned to


@dataclass(frozen=True)
class Unit:
    """What one owner updates: `chunk` of the global parameter `name`."""

    name: str
    chunk: Chunk


@dataclass(frozen=True)
class Rectangle:
    """A part of unit number `unit`, as a chunk of the global parameter."""

    unit: int
    chunk: Chunk
    rehearsed: int = 0  # in a rehearsal the rank: rectangles of all ranks are alike there, and yet different ones


@dataclass(frozen=True)
class Routes:
    """Who owns each unit, and which of the rectangles of each rank (by number) go to the owner."""

    owners: list[int]  # by unit, ranks of the group
    sent: list[list[int]]  # by rank; a rectangle that several ranks hold is sent by one of them


def routes(units: int, held: Sequence[Sequence[Rectangle]], costs: Sequence[float]) -> Routes:
    """Assign `units`: by descending cost, to the holder with the least work so far, of equal ones the first."""
    holders: list[list[int]] = [[] for _ in range(units)]
    for rank, rectangles in enumerate(held):
        for number in dict.fromkeys(rectangle.unit for rectangle in rectangles):
            holders[number].append(rank)
    work, owners = [0.0] * len(held), [0] * units
    for number in sorted(range(units), key=lambda number: (-costs[number], number)):
        owners[number] = min(holders[number] or range(len(held)), key=lambda rank: (work[rank], rank))
        work[owners[number]] += costs[number]
    sent: list[list[int]] = [[] for _ in held]
    taken: set[Rectangle] = set()
    for rank, rectangles in enumerate(held):  # what an owner holds itself is never sent to it
        taken |= {rectangle for rectangle in rectangles if owners[rectangle.unit] == rank}
    for rank, rectangles in enumerate(held):
        for number, rectangle in enumerate(rectangles):
            if owners[rectangle.unit] == rank:
                sent[rank].append(number)
            elif rectangle not in taken:
                taken.add(rectangle)
                sent[rank].append(number)
    return Routes(owners, sent)


class Ownership:
    """The units of some parameters, those of them that this rank owns, and their exchange.

    `parts` are this rank's parts of the parameters by name, empty ones too: every rank of the group has the same names.
    `units_of` gives the chunks of a global parameter that are units, and `cost` the work of one. A collective.
    """

    def __init__(
        self,
        mesh: Mesh,
        registry: Registry,
        held: Mapping[str, LocalShard],
        parts: Mapping[str, Tensor],
        units_of: Callable[[str], tuple[Chunk, ...]],
        cost: Callable[[tuple[int, ...]], float],
    ) -> None:
        layout = mesh.layout
        mesh.add_groups(OWNERS, layout.groups(*(layout.sharding if layout.shards > 1 else layout.replication), "tp"))
        self._group, self._device = mesh.group(OWNERS), mesh.device
        self._rank = dist.get_rank(self._group) if self._group is not None else 0
        self._registry, self._held = registry, held
        self.units = [Unit(name, chunk) for name in sorted(parts) for chunk in units_of(name)]
        self._names = {name: [n for n, unit in enumerate(self.units) if unit.name == name] for name in sorted(parts)}
        own = [rectangle for rectangle, _ in self._cut(parts)]
        self._all = self._exchanged(own)
        found = routes(len(self.units), self._all, [cost(unit.chunk.sizes) for unit in self.units])
        self._owners, self._sent = found.owners, found.sent
        _refuse_holes(self.units, self._all)
        self.owned = [number for number, owner in enumerate(self._owners) if owner == self._rank]
        others = [(rank, n) for rank, numbers in enumerate(self._sent) for n in numbers]
        self._gathers = any(self._owners[self._all[rank][n].unit] != rank for rank, n in others)

    def _cut(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Rectangle, Tensor]]:
        """The rectangles that this rank holds of each unit, in the order of the units, with views of `tensors`."""
        for name, numbers in self._names.items():
            if not tensors[name].numel():
                continue
            shards = list(self._registry.shards(name, "", self._held[name], tensors[name]))
            for number in numbers:
                for shard in shards:
                    part = shard.chunk.intersection(self.units[number].chunk)
                    if part is not None:
                        yield Rectangle(number, part), shard.data[part.within(shard.chunk)]

    def views(self, tensors: Mapping[str, Tensor]) -> list[tuple[int, Tensor]]:
        """This rank's rectangles of `tensors`, each with the number of its unit, in the order of `scatter`."""
        return [(rectangle.unit, view) for rectangle, view in self._cut(tensors)]

    def _exchanged(self, own: list[Rectangle]) -> list[list[Rectangle]]:
        """The rectangles of all ranks of the group."""
        if self._group is None:
            return [own]
        size = dist.get_world_size(self._group)
        if dist.get_backend(self._group) == "fake":  # a rehearsal
            return [[replace(rectangle, rehearsed=rank) for rectangle in own] for rank in range(size)]
        dims = max((len(unit.chunk.sizes) for unit in self.units), default=0)
        rows = []
        for rectangle in own:
            offsets, shape = rectangle.chunk.offsets, rectangle.chunk.sizes
            unused = (0,) * (dims - len(shape))
            rows.append([rectangle.unit, *offsets, *unused, *shape, *unused])
        counts = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=self._device), group=self._group)
        lengths = [int(count) for count in counts]
        table = torch.zeros(max(1, *lengths), 1 + 2 * dims, dtype=torch.int64)
        if rows:
            table[: len(rows)] = torch.tensor(rows)
        tables = [torch.empty_like(table, device=self._device) for _ in lengths]
        dist.all_gather(tables, table.to(self._device), group=self._group)
        found = []
        for other, length in zip(tables, lengths, strict=True):
            rectangles = []
            for unit, *numbers in other[:length].tolist():
                dim = len(self.units[unit].chunk.sizes)
                chunk = Chunk(tuple(numbers[:dim]), tuple(numbers[dims : dims + dim]))
                rectangles.append(Rectangle(unit, chunk))
            found.append(rectangles)
        return found

    def gather(self, tensors: Mapping[str, Tensor]) -> Callable[[], list[Tensor]]:
        """Start bringing the units of `tensors` (this rank's parts, by name) to their owners.

        Returns a function that waits for it and gives the owned units, whole, on the mesh's device, in the order of
        `owned`. Those that this rank holds whole share the memory of `tensors`.
        """
        own = [view for _, view in self._cut(tensors)]
        outgoing = {
            owner: [own[n] for n in self._sent[self._rank] if self._owners[self._all[self._rank][n].unit] == owner]
            for owner in range(len(self._all))
        }
        incoming = {
            rank: [self._all[rank][n] for n in self._sent[rank] if self._owners[self._all[rank][n].unit] == self._rank]
            for rank in range(len(self._all))
        }
        outgoing[self._rank] = []
        sizes = [sum(r.chunk.numel for r in incoming[rank]) if rank != self._rank else 0 for rank in incoming]
        received, work = self._exchange([outgoing[rank] for rank in outgoing], sizes, self._gathers)
        mine = {n: own[n] for n in self._sent[self._rank] if self._owners[self._all[self._rank][n].unit] == self._rank}

        def wait() -> list[Tensor]:
            if work is not None:
                work.wait()
            found: dict[int, Tensor] = {}
            for n, view in mine.items():
                self._place(found, self._all[self._rank][n], view.to(self._device))
            for rank, values in enumerate(received.split(sizes)):
                if rank == self._rank:
                    continue
                start = 0
                for rectangle in incoming[rank]:
                    stop = start + rectangle.chunk.numel
                    self._place(found, rectangle, values[start:stop].view(rectangle.chunk.sizes))
                    start = stop
            return [found[number] for number in self.owned]

        return wait

    def _place(self, found: dict[int, Tensor], rectangle: Rectangle, values: Tensor) -> None:
        unit = self.units[rectangle.unit]
        if rectangle.chunk == unit.chunk:
            found[rectangle.unit] = values
            return
        if rectangle.unit not in found:
            found[rectangle.unit] = torch.zeros(unit.chunk.sizes, device=self._device)
        found[rectangle.unit][rectangle.chunk.within(unit.chunk)] = values

    def scatter(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """Send each rank its rectangles of the owned units (`wholes`, in the order of `owned`).

        Returns this rank's rectangles, in the order of `views`, on the mesh's device.
        """
        by_unit = dict(zip(self.owned, wholes, strict=True))

        def part(rectangle: Rectangle) -> Tensor:
            return by_unit[rectangle.unit][rectangle.chunk.within(self.units[rectangle.unit].chunk)]

        outgoing = [
            [part(r) for r in rectangles if r.unit in by_unit] if rank != self._rank else []
            for rank, rectangles in enumerate(self._all)
        ]
        own = self._all[self._rank]
        sizes = [
            sum(r.chunk.numel for r in own if self._owners[r.unit] == rank) if rank != self._rank else 0
            for rank in range(len(self._all))
        ]
        received, work = self._exchange(outgoing, sizes, len(self._all) > 1)
        if work is not None:
            work.wait()
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        found = []
        for rectangle in own:
            owner = self._owners[rectangle.unit]
            if owner == self._rank:
                found.append(part(rectangle))
                continue
            start = starts[owner]
            starts[owner] = start + rectangle.chunk.numel
            found.append(received[start : starts[owner]].view(rectangle.chunk.sizes))
        return found

    def _exchange(
        self, outgoing: Sequence[Sequence[Tensor]], sizes: list[int], needed: bool
    ) -> tuple[Tensor, dist.Work | None]:
        """Start one all-to-all: `outgoing` are the tensors for each rank, `sizes` the elements from each."""
        received = torch.empty(sum(sizes), device=self._device)
        if self._group is None or not needed:
            return received, None
        flat = [tensor.reshape(-1) for tensors in outgoing for tensor in tensors]
        message = torch.cat(flat).to(self._device) if flat else torch.empty(0, device=self._device)
        counts = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
        work = dist.all_to_all_single(received, message, sizes, counts, group=self._group, async_op=True)
        return received, work


def _refuse_holes(units: Sequence[Unit], held: Sequence[Sequence[Rectangle]]) -> None:
    """An owner would update a unit that no rank of the group holds whole as if the rest of it were zero."""
    found = [0] * len(units)
    for rectangle in {rectangle for rectangles in held for rectangle in rectangles}:
        found[rectangle.unit] += rectangle.chunk.numel
    for unit, elements in zip(units, found, strict=True):
        assert elements >= unit.chunk.numel, f"{elements} elements of {unit} are held by these ranks"


def parameter(shape: tuple[int, ...]) -> tuple[Chunk, ...]:
    """The one unit of a parameter that is updated whole."""
    return (whole(shape),)
