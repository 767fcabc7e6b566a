"""A trace of torch's profiler, read piece by piece into columns: about 50 bytes for each event kept.

The file is Chrome's JSON as kineto writes it, which Perfetto and Holistic Trace Analysis read too. Its fields that are
used here: `cat`, `name`, `tid`, `ts` and `dur` (microseconds), and of `args` "Sequence number" and "Fwd thread id" of
operations, "correlation" of kernels and of the calls that launch them, "bytes" of copies, and of NCCL's kernels
"Collective name", "Process Group Description", "Process Group Name" and "Group size".
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from stoker.conf.reasons import reason
from stoker.trainer.report.breakdown import MODULE

OPERATION, RANGE, CALL, KERNEL, COPY, MEMSET = range(6)  # kinds of events
_KINDS = {
    "cpu_op": OPERATION,
    "user_annotation": RANGE,
    "cuda_runtime": CALL,
    "cuda_driver": CALL,
    "kernel": KERNEL,
    "gpu_memcpy": COPY,
    "gpu_memset": MEMSET,
}
_CHARACTERS = 1 << 20  # read at a time
_MOST_CHARACTERS = 1 << 24  # of one event, or of what stands before the first
_EVENTS = re.compile(r'"traceEvents"\s*:\s*\[')
_BETWEEN = re.compile(r"[\s,]*")
_COPY = re.compile(r"Memcpy (\w+)")


@dataclass
class Columns:
    """Of each event kept, in the order of the file: times in nanoseconds."""

    kind: array[int] = field(default_factory=lambda: array("b"))
    name: array[int] = field(default_factory=lambda: array("i"))  # number in `Trace.names`
    thread: array[int] = field(default_factory=lambda: array("q"))  # of the host, or a stream
    start: array[int] = field(default_factory=lambda: array("q"))
    end: array[int] = field(default_factory=lambda: array("q"))
    link: array[int] = field(default_factory=lambda: array("q"))  # correlation, or number of a node of the graph; -1
    backward: array[int] = field(default_factory=lambda: array("b"))  # an operation of the backward pass?
    label: array[int] = field(default_factory=lambda: array("i"))  # number in `Trace.collectives`; -1

    def numpy(self, name: str) -> np.ndarray:
        """A column, `[events]`, without a copy."""
        column = getattr(self, name)
        return np.frombuffer(column, dtype=column.typecode) if column else np.zeros(0, dtype=column.typecode)


@dataclass
class Trace:
    """What one rank did in the traced steps."""

    header: dict[str, Any]  # what stands before the events: `host_name`, `stoker.memory`
    names: list[str] = field(default_factory=list)
    columns: Columns = field(default_factory=Columns)
    collectives: list[tuple[str, str, int]] = field(default_factory=list)  # kind, group, its ranks (0: unknown)
    copies: dict[str, list[float]] = field(default_factory=dict)  # HtoD, DtoH, DtoD, ...: count, seconds, bytes


def read_trace(path: Path) -> Trace:
    """Read a trace. Raises ValueError, naming the file and the place, for what is none."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            return _read(file)
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path}: the file is cut off or damaged: {error}") from error
    except gzip.BadGzipFile as error:
        raise ValueError(f"{path}: {reason(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(file: IO[str]) -> Trace:
    text, begin = "", None
    while begin is None and len(text) < _MOST_CHARACTERS and (more := file.read(_CHARACTERS)):
        text += more
        begin = _EVENTS.search(text)
    if begin is None:
        raise ValueError("it is no trace: it has no traceEvents")
    trace = Trace(_header(text[: begin.start()]))
    names: dict[str, int] = {}
    labels: dict[tuple[str, str, int], int] = {}
    for number, event in enumerate(_events(text[begin.end() :], file), 1):
        try:
            kind = _KINDS.get(event.get("cat"))
            if kind is not None and event.get("ph") == "X":
                _add(trace, kind, event, names, labels)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"event {number} is none of a trace: {str(event)[:200]}") from error
    trace.names, trace.collectives = list(names), list(labels)
    return trace


def _header(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text.rstrip().rstrip(",") + "}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _events(text: str, file: IO[str]) -> Iterator[Any]:
    """The objects of a list whose "[" was read, of which `text` is the beginning and `file` the rest."""
    decoder, at = json.JSONDecoder(), 0
    while True:
        between = _BETWEEN.match(text, at)
        assert between is not None
        at = between.end()
        if text[at : at + 1] == "]":
            return
        try:
            event, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            more = file.read(_CHARACTERS) if len(text) - at < _MOST_CHARACTERS else ""
            if not more:
                raise ValueError(f"its events end amid one: {text[at : at + 80]!r}") from error
            text, at = text[at:] + more, 0
        else:
            yield event


def _add(
    trace: Trace, kind: int, event: dict[str, Any], names: dict[str, int], labels: dict[tuple[str, str, int], int]
) -> None:
    columns, more = trace.columns, event.get("args") or {}
    name, start = str(event["name"]), round(event["ts"] * 1000)
    end = start + max(0, round(event["dur"] * 1000))
    link, label = -1, -1
    if kind == OPERATION and name.startswith(MODULE):
        kind = RANGE
    if kind in (CALL, KERNEL):
        link = int(more.get("correlation", -1))
    elif kind == OPERATION:
        link = int(more.get("Sequence number", -1))
    elif kind == COPY:
        direction = _COPY.match(name)
        found = trace.copies.setdefault(direction[1] if direction else "other", [0, 0.0, 0])
        found[0] += 1
        found[1] += (end - start) * 1e-9
        found[2] += int(more.get("bytes", 0))
    if kind == KERNEL and name.startswith("nccl"):
        what = str(more.get("Collective name") or name.partition("(")[0])
        group = str(more.get("Process Group Description") or more.get("Process Group Name") or "")
        label = labels.setdefault((what, group, int(more.get("Group size", 0))), len(labels))
    elif kind == RANGE and name.startswith("gloo:"):
        label = labels.setdefault((name.removeprefix("gloo:"), "", 0), len(labels))
    columns.kind.append(kind)
    columns.name.append(names.setdefault(name, len(names)))
    columns.thread.append(int(event["tid"]))
    columns.start.append(start)
    columns.end.append(end)
    columns.link.append(link)
    columns.backward.append(int(more.get("Fwd thread id", 0)) > 0)
    columns.label.append(label)
