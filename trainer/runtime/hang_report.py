"""Collects the state of ranks that make no progress, and formats the report."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.process import Phase, Stamp
from stoker.trainer.runtime.stack_dump import MAIN_ANSWERS, SIGNAL, THREAD_ANSWERS

ANSWER_SECONDS = 2.0
LEAST_SECONDS = 0.5  # a computing rank is recognised by the processor time that it uses meanwhile
_ORDER = tuple(Phase)
WAITING = "waits for other ranks"
_CANNOT_ANSWER = ("", "Z", "T", "t")  # letters of /proc for a process that cannot answer: gone or stopped
SHOWN = 32  # ranks in the table, those that are behind first
# Code that waits for other ranks: MODULE, or MODULE:FUNCTION. Nothing of it is imported here: most is torch's, and the
# watchdog beside a rank is a light process. tests/trainer/runtime/test_watchdog.py looks up every name.
COLLECTIVES = (  # their functions enter C at once
    "torch.distributed.distributed_c10d",
    "torch.distributed._functional_collectives",
    "torch.distributed.fsdp._fully_shard._fsdp_collectives",
)
AWAITING = (  # as the innermost frame: of a collective that was begun elsewhere
    "stoker.parallel.replicated:_Buckets.wait",
    "torch.distributed.pipelining.schedules:_wait_batch_p2p",
)
BACKWARD = "torch.autograd.graph:_engine_run_backward"  # here the main thread waits for the threads of a backward pass


@dataclass(frozen=True)
class Finding:
    """The findings about one rank."""

    rank: int
    host: str
    step: int
    phase: Phase
    seconds: float  # since it entered the phase
    state: str
    frame: str = ""  # innermost Python frame of the main thread


def place_of(at: Stamp | Finding) -> tuple[int, int]:
    """Orders ranks by how far they are."""
    return at.step, _ORDER.index(at.phase)


def behind(findings: Sequence[Finding]) -> list[Finding]:
    """The ranks that the others wait for: the furthest behind, without those among them that wait themselves."""
    last = min(place_of(finding) for finding in findings)
    there = [finding for finding in findings if place_of(finding) == last]
    active = [finding for finding in there if finding.state != WAITING]
    return active or there


def examine(
    run: RunDirectory, attempt: int, stamps: Mapping[int, Stamp], seconds: Mapping[int, float]
) -> list[Finding]:
    """Query the ranks of this machine (see `stack_dump`) and the kernel. Takes up to ANSWER_SECONDS."""
    before = {rank: _processor_seconds(stamp.pid) for rank, stamp in stamps.items()}
    for stamp in stamps.values():
        with suppress(ProcessLookupError):
            os.kill(stamp.pid, SIGNAL)
    asked = time.monotonic()
    stacks: dict[int, str] = {}
    while (waited := time.monotonic() - asked) < ANSWER_SECONDS:
        stacks = {rank: _text(run.stacks(attempt, rank)) for rank in stamps}
        silent = [rank for rank, text in stacks.items() if THREAD_ANSWERS not in text or MAIN_ANSWERS not in text]
        if waited > LEAST_SECONDS and all(_kernel_state(stamps[rank].pid) in _CANNOT_ANSWER for rank in silent):
            break
        time.sleep(0.05)
    found = []
    for rank, stamp in stamps.items():
        busy = _processor_seconds(stamp.pid) - before[rank] > 0.2 * waited
        state = state_of(_kernel_state(stamp.pid), stacks.get(rank, ""), stamp.phase, busy)
        frame = innermost(stacks.get(rank, ""))
        found.append(Finding(rank, stamp.host, stamp.step, stamp.phase, seconds.get(rank, 0.0), state, frame))
    return found


def state_of(kernel: str, stacks: str, phase: Phase, busy: bool) -> str:
    """The state of a rank, from the letter of its main thread in /proc (empty: no such process), its answers, and
    whether it used a processor meanwhile."""
    if not kernel or kernel == "Z":
        return "its process is gone"
    if kernel in "Tt":
        return "stopped by a signal (SIGSTOP)"
    if not stacks:
        return "in the kernel: a disk or a driver" if kernel == "D" else "does not answer"
    if _waits(stacks):
        return WAITING
    if phase is Phase.DATA:
        return "waits for its rows"
    doing = "computing" if busy else "asleep"
    if THREAD_ANSWERS not in stacks:
        return f"in a C call that keeps the interpreter, {doing}"
    if MAIN_ANSWERS not in stacks:
        return f"in a C call, {doing}"
    return f"in Python, {doing}"


class Frame(NamedTuple):
    """A line of a stack that faulthandler wrote."""

    path: str
    line: str
    function: str  # without its class

    def is_of(self, place: str) -> bool:
        """`place`: MODULE, or MODULE:FUNCTION."""
        module, _, function = place.partition(":")
        return self.path.endswith(f"/{module.replace('.', '/')}.py") and function.split(".")[-1] in ("", self.function)


def _frames(lines: Sequence[str]) -> list[Frame]:
    found = []
    for line in lines:
        if line.startswith('  File "'):
            path, _, rest = line.removeprefix('  File "').partition('", line ')
            number, _, function = rest.partition(" in ")
            found.append(Frame(path, number, function))
    return found


def _of_main(stacks: str) -> list[Frame]:
    """The frames of the main thread, which faulthandler writes last, innermost first."""
    lines = stacks.splitlines()
    heads = [at for at, line in enumerate(lines) if line.startswith(("Thread 0x", "Current thread 0x"))]
    return _frames(lines[heads[-1] :]) if heads else []


def _waits(stacks: str) -> bool:
    """Whether the main thread is in a collective, or a backward pass is, which on GPUs runs in other threads."""
    main = _of_main(stacks)
    if not main:
        return False
    if any(main[0].is_of(function) for function in AWAITING):
        return True
    frames = _frames(stacks.splitlines()) if main[0].is_of(BACKWARD) else main
    return any(frame.is_of(module) for frame in frames for module in COLLECTIVES)


def innermost(stacks: str) -> str:
    """`file.py:12 function` of the main thread; empty without a stack."""
    main = _of_main(stacks)
    return f"{'/'.join(Path(main[0].path).parts[-2:])}:{main[0].line} {main[0].function}" if main else ""


def table(findings: Sequence[Finding]) -> str:
    """One line per rank, the furthest behind first; a long table is cut."""
    first = behind(findings)
    ordered = [*first, *(finding for finding in findings if finding not in first)]
    head = ("rank", "host", "step", "phase", "seconds", "state", "innermost Python frame")
    rows = [(str(f.rank), f.host, str(f.step), f.phase, f"{f.seconds:.0f}", f.state, f.frame) for f in ordered[:SHOWN]]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    more = [f"and {len(ordered) - SHOWN} more"] if len(ordered) > SHOWN else []
    return "\n".join([*(line.rstrip() for line in lines), *more])


def explain(findings: Sequence[Finding]) -> str:
    """One line: the ranks that hold the run up, and where."""
    first = behind(findings)
    one = first[0]
    where = f"{one.phase} of step {one.step}" if one.step else one.phase
    several = len(first) > 1
    if all(finding.state == WAITING for finding in first) and len(first) == len(findings) > 1:
        return f"all {len(first)} ranks wait for each other in {where}: a connection or a message was lost"
    who = ("ranks " if several else "rank ") + ", ".join(str(finding.rank) for finding in first[:8])
    who += (f" and {len(first) - 8} more" if len(first) > 8 else "") + f" on {one.host}"
    frame = f" ({one.frame})" if one.frame else ""
    if all(finding.state == WAITING for finding in first) and len(findings) > len(first):
        lost = "a message was lost, or ranks run different collectives"
        return f"{who} wait{'' if several else 's'} in {where}{frame} for ranks that have left it: {lost}"
    held = f"hold{'' if several else 's'} the run up, for {one.seconds:.0f} s in {where}"
    return f"{who} {held}: {one.state}{frame}"


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process. A stop by a debugger does not count."""
    return _kernel_state(pid) == "T"


def _kernel_state(pid: int) -> str:
    fields = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[0] if fields else ""


def _processor_seconds(pid: int) -> float:
    """That the main thread was on a processor or in line for one, which on a busy machine may be long."""
    words = _text(Path(f"/proc/{pid}/schedstat")).split()
    return (int(words[0]) + int(words[1])) / 1e9 if words else 0.0


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
