"""What a trace says of one rank: seconds of a step by phase, module, operator or kernel, and collective.

All figures are means over the traced steps. Seconds of operators and modules are their own, without those inside of
them, so they add up. On CPUs they are the host's; on GPUs those of the kernels that were launched there.

    module      the innermost range `module:<name>` around an operation, or around the call that launched a kernel. In
                the backward pass, the module whose forward made the node of the graph that is being evaluated
                (operations and nodes have the same number). A module's forward that runs amid the backward pass is
                recomputation.
    collective  it is exposed as `stoker.trainer.report.breakdown` defines it; one exposed beside another counts in both
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stoker.launch.profile.trace import CALL, COPY, KERNEL, MEMSET, OPERATION, RANGE, Trace
from stoker.trainer.report.breakdown import (
    BUBBLE,
    CHECKPOINT,
    EXPOSED,
    MODULE,
    PREFIX,
    Event,
    Interval,
    common,
    computes,
    exposed_communication,
    minus,
    phase_seconds,
    pipeline_bubble,
    seconds_of,
    union,
)

STEP = "ProfilerStep#"
_NODE = "autograd::engine::evaluate_function"
FORWARD, BACKWARD, RECOMPUTED = range(3)


@dataclass
class Collective:
    """A kind of collective in one group; per step."""

    kind: str
    group: str  # its description; empty where the backend records none
    ranks: int  # 0: not recorded
    count: float
    seconds: float
    exposed_seconds: float


@dataclass
class RankProfile:
    """Means over the traced steps of one rank."""

    rank: int
    host: str
    steps: list[int]
    on_gpu: bool
    step_seconds: float
    phases: dict[str, float]  # seconds by phase, without exposed communication
    exposed_seconds: float  # communication that is not hidden by computation, without the bubble
    bubble_seconds: float | None  # in which this stage of a pipeline waits for another; None without a pipeline
    checkpoint_seconds: float  # that saves held this rank up, within steps and between them
    held_seconds: float  # of these, within steps
    most_data_seconds: float  # the longest wait for rows
    idle_seconds: float | None  # in which the device did nothing; None on CPUs
    top: list[tuple[str, float, float]]  # kernels or operators: name, calls, own seconds, the longest first
    modules: dict[str, list[float]]  # own seconds of forward, backward, recomputation
    typical: dict[str, float]  # of modules: all own seconds in the median step, so without the stalls of one
    collectives: list[Collective]
    copies: dict[str, list[float]]  # HtoD, DtoH, ...: count, seconds, bytes
    memory: dict[str, int] = field(default_factory=dict)  # bytes; "peak", and what of it is known

    @property
    def data_seconds(self) -> float:
        return self.phases.get("data", 0.0)

    @property
    def work_seconds(self) -> float:
        """Of a step, without communication and without waiting for rows or saves."""
        waiting = self.exposed_seconds + (self.bubble_seconds or 0.0) + self.data_seconds + self.held_seconds
        return max(0.0, self.step_seconds - waiting)


def measure(trace: Trace, rank: int) -> RankProfile:
    """The figures of a rank. Raises ValueError for a trace without a step."""
    view = _View(trace)
    steps = len(view.windows)
    top, modules = _own_seconds(view)
    events = list(view.events())
    phases = phase_seconds(events)
    exposed = common(exposed_communication(events), view.windows)
    bubble = pipeline_bubble(events, exposed)
    idle = None
    if view.on_gpu:
        idle = seconds_of(minus(view.windows, union(view.device_events()))) / steps
    known = trace.header.get("stoker.memory")
    saves = [event for event in view.of(view.kind == RANGE) if event.name == CHECKPOINT]
    return RankProfile(
        rank=rank,
        host=str(trace.header.get("host_name", "")),
        steps=view.steps,
        on_gpu=view.on_gpu,
        step_seconds=seconds_of(view.windows) / steps,
        phases={
            name.removeprefix("phase_").removesuffix("_seconds"): seconds / steps
            for name, seconds in phases.items()
            if name not in (EXPOSED, BUBBLE)
        },
        exposed_seconds=seconds_of(minus(exposed, bubble or [])) / steps,
        bubble_seconds=None if bubble is None else seconds_of(bubble) / steps,
        checkpoint_seconds=seconds_of(union(saves)) / steps,
        held_seconds=seconds_of(common(union(saves), view.windows)) / steps,
        most_data_seconds=max((e.end - e.start for e in events if e.name == f"{PREFIX}data"), default=0) * 1e-9,
        idle_seconds=idle,
        top=[(name, count / steps, seconds / steps) for name, (count, seconds) in top],
        modules={name: (seconds.sum(0) / steps).tolist() for name, seconds in modules.items()},
        typical={name: float(np.median(seconds.sum(1))) for name, seconds in modules.items()},
        collectives=_collectives(view, exposed, steps),
        copies={direction: [value / steps for value in values] for direction, values in trace.copies.items()},
        memory={str(k): v for k, v in known.items() if type(v) is int} if isinstance(known, dict) else {},
    )


class _View:
    """The columns of a trace, with the events of its steps."""

    def __init__(self, trace: Trace) -> None:
        self.names, self.labels = trace.names, trace.collectives
        columns = trace.columns
        self.kind, self.name, self.thread = (columns.numpy(which) for which in ("kind", "name", "thread"))
        self.start, self.end, self.link = (columns.numpy(which) for which in ("start", "end", "link"))
        self.backward, self.label = columns.numpy("backward"), columns.numpy("label")
        found = sorted(
            (int(self.start[at]), int(self.end[at]), int(number))
            for at in np.flatnonzero(self.kind == RANGE)
            if (name := self.names[self.name[at]]).startswith(STEP) and (number := name.removeprefix(STEP)).isdigit()
        )
        if not found:
            raise ValueError(f"no step is traced: there is no range {STEP}N")
        self.windows: list[Interval] = [(start, end) for start, end, _ in found]
        self.steps = [number for _, _, number in found]
        self.on_gpu = bool((self.kind == KERNEL).any())
        marks = [at for at in np.flatnonzero(self.kind == RANGE) if self.names[self.name[at]].startswith(PREFIX)]
        self.main = int(self.thread[marks[0]]) if marks else -1
        self.step = self._step_of_each()
        self.inside = self.step >= 0

    def _step_of_each(self) -> np.ndarray:
        """In which traced step an event, or the call that launched it, begins, counted from 0; -1: in none."""
        begins = self.start.copy()
        if self.on_gpu:
            calls = np.flatnonzero(self.kind == CALL)
            calls = calls[np.argsort(self.link[calls])]
            for kind in (KERNEL, COPY, MEMSET):
                rows = np.flatnonzero(self.kind == kind)
                place = np.minimum(np.searchsorted(self.link[calls], self.link[rows]), max(0, len(calls) - 1))
                if len(calls):
                    same = self.link[calls[place]] == self.link[rows]
                    begins[rows[same]] = self.start[calls[place[same]]]
        starts = np.array([start for start, _ in self.windows])
        ends = np.array([end for _, end in self.windows])
        number = np.searchsorted(starts, begins, side="right") - 1
        return np.where((number >= 0) & (begins < ends[np.maximum(number, 0)]), number, -1)

    def of(self, chosen: np.ndarray) -> Iterator[Event]:
        """Events of the rows for which `chosen`, bool `[events]`, holds."""
        for at in np.flatnonzero(chosen):
            kind = self.kind[at]
            yield Event(
                self.names[self.name[at]],
                int(self.start[at]),
                int(self.end[at]),
                int(self.thread[at]),
                annotation=bool(kind == RANGE),
                on_device=bool(kind >= KERNEL),
                correlation=int(self.link[at]) if kind in (CALL, KERNEL) else 0,
            )

    def device_events(self) -> Iterator[Event]:
        return self.of(self.kind >= KERNEL)

    def events(self) -> Iterator[Event]:
        """What the breakdown of these steps needs; operations one inside the other are one."""
        named = np.array([name.startswith((PREFIX, "gloo:")) for name in self.names])
        yield from self.of(self.inside & (self.kind == RANGE) & named[self.name])
        if self.on_gpu:
            launching = np.isin(self.link, self.link[self.kind == KERNEL])
            yield from self.of(self.inside & ((self.kind == KERNEL) | ((self.kind == CALL) & launching)))
            return
        computing = np.array([computes(name) for name in self.names])
        rows = np.flatnonzero((self.kind == OPERATION) & (self.thread == self.main) & computing[self.name])
        rows = rows[np.argsort(self.start[rows], kind="stable")]
        start, latest = self.start[rows], np.maximum.accumulate(self.end[rows]) if len(rows) else self.end[rows]
        first = np.flatnonzero(np.concatenate([[True], start[1:] > latest[:-1]])) if len(rows) else rows
        last = np.concatenate([first[1:] - 1, [len(rows) - 1]]) if len(rows) else rows
        for one, other in zip(first, last, strict=True):
            yield Event("aten::", int(start[one]), int(latest[other]), self.main)


def _own_seconds(view: _View) -> tuple[list[tuple[str, tuple[int, float]]], dict[str, np.ndarray]]:
    """Operators or kernels, the longest first, with their calls and seconds; seconds of modules, `[steps, 3]`."""
    operators: dict[str, list[float]] = {}
    modules: dict[str, np.ndarray] = {}

    def book(owner: tuple[str, int], row: int, seconds: float) -> None:
        if owner[0] not in modules:
            modules[owner[0]] = np.zeros((len(view.windows), 3))
        modules[owner[0]][view.step[row], owner[1]] += seconds

    launched: dict[int, tuple[str, int]] = {}  # by correlation: the module, and which of its seconds
    for name, seconds, owner, row in _frames(view):
        kind = view.kind[row]
        if kind == CALL:
            if owner is not None:
                launched[int(view.link[row])] = owner
            continue
        if view.on_gpu:
            continue
        if kind == OPERATION:
            entry = operators.setdefault(name, [0, 0.0])
            entry[0] += 1
            entry[1] += seconds
        if owner is not None:
            book(owner, row, seconds)
    for row in np.flatnonzero(view.inside & (view.kind == KERNEL)).tolist():
        seconds = float(view.end[row] - view.start[row]) * 1e-9
        entry = operators.setdefault(view.names[view.name[row]], [0, 0.0])
        entry[0] += 1
        entry[1] += seconds
        found = launched.get(int(view.link[row]))
        if found is not None and view.label[row] < 0:
            book(found, row, seconds)
    ordered = sorted(operators.items(), key=lambda each: -each[1][1])
    return [(name, (int(count), seconds)) for name, (count, seconds) in ordered], modules


def _frames(view: _View) -> Iterator[tuple[str, float, tuple[str, int] | None, int]]:
    """Each operation, range and call of the threads that compute: name, own seconds, owner, row."""
    node = np.array([name.startswith(_NODE) for name in view.names])
    host = view.inside & (view.kind <= CALL)
    threads = {view.main, *map(int, np.unique(view.thread[host & node[view.name]]))}
    makers: dict[int, str] = {}  # by number of a node of the graph: the module whose forward made it
    for thread in sorted(threads, key=lambda thread: thread != view.main):  # forward first
        rows = np.flatnonzero(host & (view.thread == thread))
        rows = rows[np.lexsort((-view.end[rows], view.start[rows]))]
        stack: list[list[Any]] = []  # end, nanoseconds inside, row, owner, amid the backward pass?
        for row in rows.tolist():
            start, end, name = int(view.start[row]), int(view.end[row]), view.names[view.name[row]]
            while stack and stack[-1][0] <= start:
                yield _left(view, stack)
            owner, amid = (stack[-1][3], stack[-1][4]) if stack else (None, thread != view.main)
            link = int(view.link[row])
            if view.kind[row] == RANGE:
                if name.startswith(MODULE):
                    owner = (name.removeprefix(MODULE), RECOMPUTED if amid else FORWARD)
                amid = amid or name == f"{PREFIX}backward"
            elif node[view.name[row]]:
                amid = True
                owner = (makers[link], BACKWARD) if link in makers else None
            elif view.kind[row] == OPERATION and link >= 0 and not amid and not view.backward[row]:
                if owner is not None:
                    makers[link] = owner[0]
                else:
                    makers.pop(link, None)  # the last operation with a number is the one that makes its node
            stack.append([end, 0, row, owner, amid])
        while stack:
            yield _left(view, stack)


def _left(view: _View, stack: list[list[Any]]) -> tuple[str, float, tuple[str, int] | None, int]:
    _, inside, row, owner, _ = stack.pop()
    whole = int(view.end[row] - view.start[row])
    if stack:
        stack[-1][1] += whole
    return view.names[view.name[row]], max(0, whole - inside) * 1e-9, owner, row


def _collectives(view: _View, exposed: list[Interval], steps: int) -> list[Collective]:
    found = []
    for label, (kind, group, ranks) in enumerate(view.labels):
        events = list(view.of(view.inside & (view.label == label)))
        runs = union(events)
        shown = seconds_of(common(runs, exposed))
        if events:
            found.append(Collective(kind, group, ranks, len(events) / steps, seconds_of(runs) / steps, shown / steps))
    return sorted(found, key=lambda each: (-each.exposed_seconds, -each.seconds))
