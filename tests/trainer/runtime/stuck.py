"""`python -m tests.trainer.runtime.stuck RUN KIND ...`: ranks that get stuck, each in its way.

They stamp and stack dump as ranks do. Forked from one process, which waits for them and prints how each has ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.process import Phase, Phases
from stoker.trainer.runtime.signal_listener import SignalListener
from stoker.trainer.runtime.stack_dump import StackDump

COLLECTIVES = ("in a collective", "out of it")  # kinds of ranks that form a group


def sleeping_in_python() -> None:
    while True:
        time.sleep(1.0)


def computing_in_python() -> NoReturn:
    while True:
        pass


def locked_twice(library: ctypes.CDLL) -> None:
    """A C call that no signal ends."""
    mutex = ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def get_stuck(run: RunDirectory, rank: int, kind: str) -> None:
    phase = Phases(run.attempt(1) / f"rank-{rank}.stamp")
    StackDump(run.stacks(1, rank), run.flight(1, rank), SignalListener())
    if kind in COLLECTIVES:
        store = dist.FileStore(str(run.path / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=COLLECTIVES.index(kind), world_size=2)
        dist.all_reduce(torch.ones(1))
    phase(1, Phase.DATA)
    phase(2 + (kind == "out of it"), Phase.UPDATE)
    if kind == "in a collective":
        dist.all_reduce(torch.ones(1))
    elif kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "in C":
        locked_twice(ctypes.CDLL(None))
    elif kind == "in C with the interpreter":
        locked_twice(ctypes.PyDLL(None))
    elif kind == "computing in C":
        sum(range(10**12))
    elif kind == "computing":
        computing_in_python()
    else:
        sleeping_in_python()


def main(run: RunDirectory, kinds: list[str]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    pids = []
    for rank, kind in enumerate(kinds):
        pids.append(os.fork())
        if not pids[-1]:
            get_stuck(run, rank, kind)
    print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])


if __name__ == "__main__":
    main(RunDirectory(Path(sys.argv[1])), sys.argv[2:])
