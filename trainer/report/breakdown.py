"""Where the time of one traced step goes: its phases, and the communication that is not hidden by computation.

A trace of a step holds ranges that the loop and the engine mark on the thread that computes: `stoker.data`,
`stoker.forward`, `stoker.backward` and `stoker.update`, once for each micro-batch where there are several.

    phases     On CPUs a phase is its ranges. On GPUs a range ends long before the kernels launched in it, so a phase is
               timed on the device: it begins when the host has entered its range and the computation launched before is
               done, and ends when the host has left the range and the computation launched in it is done. An idle
               device thus counts for the phase in which the host is late.
    exposed    On GPUs communication is exposed while an NCCL kernel runs and no computing kernel does. A collective
               waits for slower ranks inside its kernel, so that counts too. Copies hide nothing.
               On CPUs collectives run on gloo's threads, and no event says that the computing thread waits for one. But
               while it waits it computes nothing: if a collective ends between two of its operations, it was waiting
               from the first of these on, or from the collective's start, until that end.
    bubble     The exposed part in which a transfer between stages of a pipeline is under way and no collective is: the
               stage has nothing to compute until its neighbour is done. The transfer itself is in it.

Exposed communication is taken off the phase into which it falls, and the bubble is counted apart from it. So the
phases and these two add up to the step, from the first range to the end of the last, except for what lies between
ranges (waiting for a snapshot's copy).

Not seen: the cost of a hidden collective to the computation beside it, in cores or memory bandwidth; on CPUs, the
microseconds between two operations in which an unawaited collective happens to end, which count as waiting; other
backends than NCCL and gloo. Tracing makes each operation some microseconds longer.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

PREFIX = "stoker."
RANGES = ("stoker.data", "stoker.forward", "stoker.backward", "stoker.update")  # of the phases
MODULE = "module:"  # begins the names of the ranges that traces have of modules
OVER_RANKS: dict[str, Callable[[Sequence[float]], float]] = {"min": min, "median": statistics.median, "max": max}
CHECKPOINT = "stoker.checkpoint"  # marks what a save holds up: no phase of a step
EXPOSED = "phase_communication_exposed_seconds"
BUBBLE = "phase_bubble_seconds"  # only where ranks are stages of a pipeline
_NOT_COMPUTING = ("autograd::", "torch::autograd::", "c10d::", "_c10d_functional::")  # they contain or start others
_GLOO_TRANSFERS = ("gloo:send", "gloo:recv")
_COMPILED = "## Call CompiledFxGraph"

Interval = tuple[int, int]  # start and end in nanoseconds


class Event(NamedTuple):
    """The fields of a trace event that the breakdown needs."""

    name: str
    start: int  # nanoseconds
    end: int
    thread: int = 0  # of the host; the profiler's own numbers
    annotation: bool = False  # a range named by a program, torch's own included
    on_device: bool = False
    correlation: int = 0  # the same for a kernel and the call that launched it


def events_of(profile: torch.profiler.profile) -> list[Event]:
    """The events of a profile that has stopped. Raw ones: torch's `events()` takes a second for 20,000 of them."""
    from torch.autograd import DeviceType

    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    return [
        Event(
            event.name(),
            event.start_ns(),
            event.end_ns(),
            event.start_thread_id(),
            event.is_user_annotation(),
            event.device_type() != DeviceType.CPU,
            event.correlation_id(),
        )
        for event in profile.profiler.kineto_results.events()
    ]


def phase_seconds(events: Sequence[Event]) -> dict[str, float]:
    """The metrics of one step: `phase_<name>_seconds` for each phase marked, communication exposed, and a bubble.

    The events of several steps give the sums over all of them.
    """
    ranges = _ranges(events)
    if not ranges:
        return {}
    exposed = exposed_communication(events)
    done = _last_kernels(ranges, [kernel for kernel in _kernels(events) if not _communicates(kernel)], events)
    seconds: dict[str, float] = {}
    now = 0
    for marked, kernel_end in zip(ranges, done, strict=True):
        begin = max(marked.start, now)
        now = max(begin, marked.end, kernel_end)
        key = f"phase_{marked.name.removeprefix(PREFIX)}_seconds"
        seconds[key] = seconds.get(key, 0.0) + seconds_of(minus([(begin, now)], exposed))
    bubble = pipeline_bubble(events, exposed)
    waiting = {EXPOSED: seconds_of(exposed if bubble is None else minus(exposed, bubble))}
    return seconds | waiting | ({} if bubble is None else {BUBBLE: seconds_of(bubble)})


def over_ranks(phases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The least, median and largest value over ranks of each phase that all of them have; none for a single rank.

    As metrics: `phase_forward_seconds_min`, `phase_forward_seconds_median`, `phase_forward_seconds_max`, ...
    """
    if len(phases) < 2:
        return {}
    found = {}
    for name in phases[0]:
        if all(name in other for other in phases):
            values = [other[name] for other in phases]
            for kind, of in OVER_RANKS.items():
                found[f"{name}_{kind}"] = of(values)
    return found


def exposed_communication(events: Sequence[Event]) -> list[Interval]:
    """When this rank communicates, or waits for others, and does not compute: see the head of this file."""
    kernels, ranges = _kernels(events), _ranges(events)
    if kernels:
        communicating, computing = ([k for k in kernels if _communicates(k) is kind] for kind in (True, False))
        return minus(union(communicating), union(computing))
    return _waiting(ranges, events) if ranges else []


def pipeline_bubble(events: Sequence[Event], exposed: Sequence[Interval]) -> list[Interval] | None:
    """The parts of `exposed` in which a stage of a pipeline waits for another; None without transfers."""
    communicating = [e for e in _kernels(events) if _communicates(e)] or [e for e in events if _of_gloo(e)]
    transfers, collectives = (union(e for e in communicating if _transfers(e) is kind) for kind in (True, False))
    return common(exposed, minus(transfers, collectives)) if transfers else None


def _ranges(events: Iterable[Event]) -> list[Event]:
    found = (event for event in events if event.annotation and not event.on_device and event.name in RANGES)
    return sorted(found, key=lambda event: event.start)


def _kernels(events: Iterable[Event]) -> list[Event]:
    return [e for e in events if e.on_device and not e.annotation and not e.name.startswith(("Memcpy", "Memset"))]


def _communicates(kernel: Event) -> bool:
    return kernel.name.startswith("nccl")


def _of_gloo(event: Event) -> bool:
    return event.annotation and event.name.startswith("gloo:")


def _transfers(event: Event) -> bool:
    """Whether a communication is one between two stages of a pipeline, the only ones that two ranks have alone."""
    return event.name in _GLOO_TRANSFERS or "SendRecv" in event.name


def _last_kernels(ranges: Sequence[Event], computing: Iterable[Event], events: Iterable[Event]) -> list[int]:
    """When the last of the kernels launched in each range ends; 0 where there is none."""
    launched = {
        event.correlation: event.start
        for event in events
        if not event.on_device and not event.annotation and event.name.startswith("cu")  # cudaLaunchKernel, cuLaunch...
    }
    starts = [marked.start for marked in ranges]
    ends = [0] * len(ranges)
    for kernel in computing:
        at = launched.get(kernel.correlation, -1)
        number = bisect_right(starts, at) - 1
        if number >= 0 and at <= ranges[number].end:
            ends[number] = max(ends[number], kernel.end)
    return ends


def _waiting(ranges: Sequence[Event], events: Iterable[Event]) -> list[Interval]:
    """When the thread of `ranges` waits for gloo."""
    thread, step = ranges[0].thread, (ranges[0].start, max(marked.end for marked in ranges))
    operations, collectives = [], []
    for event in events:
        if _of_gloo(event):
            collectives.append(event)
        elif event.thread == thread and not event.annotation and computes(event.name):
            operations.append(event)
    ends = sorted(collective.end for collective in collectives)
    waits = []
    for start, end in minus([step], union(operations)):
        ended = bisect_right(ends, end)
        if ended and ends[ended - 1] > start:
            waits.append((start, ends[ended - 1]))
    return minus(waits, minus([step], union(collectives)))


def computes(name: str) -> bool:
    """Whether an event of this name is an operation, rather than Python around operations."""
    return ("::" in name and not name.startswith(_NOT_COMPUTING)) or name.startswith(_COMPILED)


def union(events: Iterable[Event]) -> list[Interval]:
    """When at least one of `events` runs: disjoint intervals, in order."""
    return list(_merged(sorted((event.start, event.end) for event in events)))


def _merged(intervals: Iterable[Interval]) -> Iterator[Interval]:
    begin, now = 0, -1
    for start, end in intervals:
        if start > now:
            if now > begin:
                yield begin, now
            begin = start
        now = max(now, end)
    if now > begin:
        yield begin, now


def minus(these: Iterable[Interval], those: Sequence[Interval]) -> list[Interval]:
    """The parts of `these` outside of `those`. Both are disjoint and in order."""
    left = []
    first = 0
    for start, end in these:
        while first < len(those) and those[first][1] <= start:
            first += 1
        at = first
        while at < len(those) and those[at][0] < end:
            if those[at][0] > start:
                left.append((start, those[at][0]))
            start = those[at][1]
            at += 1
        if start < end:
            left.append((start, end))
    return left


def common(these: Sequence[Interval], those: Sequence[Interval]) -> list[Interval]:
    """The parts of `these` that are in `those` too. Both are disjoint and in order."""
    return minus(these, minus(these, those))


def seconds_of(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals) * 1e-9
