"""Traces made by hand, in milliseconds that a reader can add up, in the format of torch's profiler."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stoker.conf.rundir import RunDirectory, write_config
from stoker.conf.schema import Config

MAIN, AUTOGRAD, GLOO, STREAM = 100, 101, 102, 7  # threads of the host, and a stream
Events = list[dict[str, Any]]


def event(category: str, name: str, start: float, end: float, thread: int = MAIN, **more: Any) -> dict[str, Any]:
    """Times in milliseconds; the file has microseconds."""
    return {
        "ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": 5e9 + start * 1e3,
        "dur": (end - start) * 1e3, "args": more,
    }  # fmt: skip


def marked(name: str, start: float, end: float, thread: int = MAIN) -> dict[str, Any]:
    """A range: of a step, a phase, a save, or a collective of gloo."""
    return event("user_annotation", name, start, end, thread)


def module(name: str, start: float, end: float, thread: int = MAIN) -> dict[str, Any]:
    return event("cpu_op", f"module:{name}", start, end, thread)


def operation(name: str, start: float, end: float, number: int = -1, thread: int = MAIN) -> dict[str, Any]:
    """`number`: of the node of the graph that it makes."""
    return event("cpu_op", name, start, end, thread, **{"Sequence number": number, "Fwd thread id": 0})


def node(name: str, start: float, end: float, number: int, thread: int = MAIN) -> dict[str, Any]:
    """The evaluation of a node of the graph, in the backward pass."""
    more = {"Sequence number": number, "Fwd thread id": 1}
    return event("cpu_op", f"autograd::engine::evaluate_function: {name}", start, end, thread, **more)


def kernel(name: str, launched: float, start: float, end: float, thread: int = MAIN, **more: Any) -> Events:
    """A kernel, and the call on the host that launched it."""
    number = round(launched * 1000) + thread
    call = event("cuda_runtime", "cudaLaunchKernel", launched, launched + 0.01, thread, correlation=number)
    return [call, event("kernel", name, start, end, STREAM, correlation=number, **more)]


def flat(*some: dict[str, Any] | Events) -> Events:
    return [one for each in some for one in (each if isinstance(each, list) else [each])]


def a_step(
    number: int,
    begin: float = 0.0,
    *,
    data: float = 1.0,
    slow: float = 0.0,
    modules: tuple[float, ...] = (10.0, 10.0, 10.0),
    again: float = 0.0,
    waits: float = 0.0,
    saves: float = 0.0,
) -> Events:
    """A step on a CPU: so many milliseconds of waiting for rows, of work outside of all ranges, of the forward (and the
    backward) of each layer's MLP, of its recomputation, of waiting for a collective, and of a save."""
    at = begin
    events: Events = []

    def then(milliseconds: float, make: Callable[[float, float], Events]) -> None:
        nonlocal at
        events.extend(make(at, at + milliseconds))
        at += milliseconds

    then(data, lambda a, b: [marked("stoker.data", a, b)])
    then(slow, lambda a, b: [operation("aten::rand", a, b)] if slow else [])
    first = at
    for layer, seconds in enumerate(modules):
        then(
            seconds,
            lambda a, b, layer=layer: [
                module(f"layers.{layer}.mlp", a, b),
                operation("aten::mm", a, b, number=100 * number + layer),
            ],
        )
    events.append(marked("stoker.forward", first, at))
    first = at
    for layer, seconds in reversed(list(enumerate(modules))):
        if again:
            then(again, lambda a, b, layer=layer: [module(f"layers.{layer}.mlp", a, b), operation("aten::mm", a, b)])
        then(
            seconds,
            lambda a, b, layer=layer: [
                node("MmBackward0", a, b, 100 * number + layer),
                operation("aten::mm", a, b),
            ],
        )
    events.append(marked("stoker.backward", first, at))
    then(saves, lambda a, b: [marked("stoker.checkpoint", a, b)] if saves else [])
    first = at
    then(1.0, lambda a, b: [operation("aten::addcdiv_", a, b)])
    if waits:
        then(waits, lambda a, b: [marked("gloo:all_reduce", a, b - 0.1, GLOO)])
    then(1.0, lambda a, b: [operation("aten::add_", a, b)])
    events.append(marked("stoker.update", first, at))
    return [*events, marked(f"ProfilerStep#{number}", begin, at)]


def steps(count: int = 3, **more: Any) -> Events:
    return flat(*(a_step(number + 10, 1000.0 * number, **more) for number in range(count)))


def write(file: Path, events: Events, indent: int | None = None, **header: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {"schemaVersion": 1, "host_name": "node-1", **header, "traceEvents": events, "traceName": "x"}
    file.write_bytes(gzip.compress(json.dumps(values, indent=indent).encode(), 1))


def a_run(path: Path, *ranks: Events, change: Callable[[Config], Any] = lambda _: None, **header: Any) -> RunDirectory:
    """A run directory with a trace for each rank, of a config that `change` has changed."""
    run, config = RunDirectory(path), Config()
    run.attempt(1).mkdir(parents=True, exist_ok=True)
    change(config)
    write_config(run, config)
    for rank, events in enumerate(ranks):
        write(run.trace(1, rank), events, **header)
    return run
