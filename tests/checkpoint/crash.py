"""Ranks that are killed or fail at the N-th system call of a kind, by strace's injection.

Two ranks, each a process, save step 2 beside the checkpoint of step 1, of which only the newer is to be kept. strace
follows one of them and strikes once. It counts the calls of each thread for itself, so that every call of every thread
is struck by some N. Ranks report over sockets with sendto, which is never struck.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from stoker.checkpoint import Checkpoints, newest, writer
from tests.checkpoint.simulated import Grid, blank, cut, holds, resume_all, saved, small_model
from tests.world import CONTEXT

CALLS = {
    "write": "write,pwrite64,writev",
    "fsync": "fsync,fdatasync",
    "rename": "rename,renameat,renameat2",
    "mkdir": "mkdir,mkdirat",
    "unlink": "unlink,unlinkat,rmdir",
}
GRID = Grid(rows=2)
OLD, NEW = small_model(1), small_model(2)


@dataclass(frozen=True)
class Blow:
    """What happened to a save in which one rank was struck."""

    struck: bool  # False: the rank made fewer such calls
    errors: list[str | None]  # of each rank; "dead" for one that could not report


def why_not() -> str | None:
    """Why nothing can be injected here; None if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    probe = ["strace", "-e", "trace=getpid", "-e", "inject=getpid:signal=SIGCONT:when=1", "-o", "/dev/null", "true"]
    ended = subprocess.run(probe, capture_output=True, text=True, check=False)
    return None if ended.returncode == 0 else f"strace may not trace here: {ended.stderr.strip()}"


def strike(directory: Path, rank: int, call: str, number: int, effect: str) -> Blow:
    """Save step 2 with `effect` (`signal=SIGKILL`, `error=EIO`) on the `number`-th `call` in a thread of `rank`."""
    pairs = [socket.socketpair() for _ in range(GRID.world)]
    processes = []
    for number_of_rank, (_, theirs) in enumerate(pairs):
        process = CONTEXT.Process(target=_rank, args=(directory, number_of_rank, theirs), daemon=True)
        process.start()
        processes.append(process)
    for ours, theirs in pairs:
        theirs.close()
        ours.settimeout(60)
        assert ours.recv(5) == b"ready"
    log = directory.with_name(f"{directory.name}.strace")
    command = ["strace", "-f", "-p", str(processes[rank].pid), "-e", f"trace={CALLS[call]}", "-o", str(log)]
    command += ["-e", f"inject={CALLS[call]}:{effect}:when={number}"]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert tracer.stderr is not None and "attached" in tracer.stderr.readline()
        for ours, _ in pairs:
            ours.sendall(b"go")
        errors = [_reported(ours) for ours, _ in pairs]
        for process in processes:
            process.join(20)
        tracer.wait(20)  # it ends with those that it traces, and then all of its log is there
        return Blow(processes[rank].exitcode == -9 or "INJECTED" in log.read_text(), errors)
    finally:
        for process in processes:
            process.kill()
            process.join()
        tracer.kill()
        tracer.communicate()
        for ours, _ in pairs:
            ours.close()


def _reported(channel: socket.socket) -> str | None:
    heard = b""
    while data := channel.recv(1 << 16):
        heard += data
    return json.loads(heard) if heard else "dead"


def _rank(directory: Path, rank: int, channel: socket.socket) -> None:
    writer.BLOCK_BYTES = 1024
    saves = Checkpoints(directory, rank=rank, world=GRID.world, attempt=1, keep=1, timeout_seconds=0.2)
    shards = cut(NEW, GRID)[rank]
    saves.prepare(shards)
    channel.sendall(b"ready")
    channel.recv(2)
    saves.save(2, shards, {"step": 2})
    (report,) = saves.wait()
    channel.sendall(json.dumps(report.error).encode())


def new_run(directory: Path) -> None:
    """A run whose checkpoint of step 1 is OLD."""
    saved(directory, OLD, 1, grid=GRID)


def check_what_is_left(directory: Path, blow: Blow) -> int:
    """The step that a resume takes, proven to be that of OLD (1) or NEW (2), bit for bit."""
    ranks = blank(cut(OLD, Grid(rows=3)))
    states = resume_all(directory, ranks)
    step = states[0]["step"]
    assert states == [{"step": step}] * 3 and step in (1, 2)
    assert holds(ranks, OLD if step == 1 else NEW)
    assert not (directory / "damaged").exists(), "what a crash leaves is never taken for a checkpoint"
    if None in blow.errors:
        assert step == 2, "a rank was told that step 2 is saved"
    assert newest(directory)
    return step
