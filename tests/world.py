"""Ranks for tests: processes forked from a server that has torch imported, with short timeouts.

    results = world.run(function, 4, argument)      # function(mesh-less) runs on 4 ranks; results in rank order

They use gloo, and with `device="cuda"` NCCL, each with a separate GPU, or with `backend="gloo"` GPUs that they may
share; `world.device()` returns, on a rank, its device.

`function` is module-level and runs after the default process group exists. A failing rank's traceback becomes the
assertion's message; ranks that outlive the timeout are killed and named.

Ranks are kept for the next call: process groups are destroyed between calls, and random numbers, environment, thread
counts and signal handlers are as they were. After a failure or a timeout the ranks of that call are replaced. `fresh`
runs a call on separate processes, which end with it: for calls that change a process permanently (DeepSpeed's module
globals, limits, a whole run with its threads) and for measurements of a process's memory.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

# A server that has run no tensor code can fork safely; it pays for the imports once. A process has one such server:
# what else a test forks comes from it, too.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "stoker.parallel.sharded",
        "stoker.parallel.pipeline",
        "stoker.models.decoder",
        "stoker.trainer.main",
        "stoker.trainer.import_check",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.qwen3.modeling_qwen3",
        "deepspeed",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "matplotlib.backends.backend_agg",
        "hypothesis",
        "pytest",
        "tests.toy",
        "tests.warm",
    ]
)

PR_SET_PDEATHSIG = 1
_DEVICE_VARIABLE = "STOKER_TEST_DEVICE"  # of a rank


def run(
    function: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    timeout: float = 60.0,
    device: str = "cpu",
    backend: str | None = None,
    fresh: bool = False,
) -> list[Any]:
    """Run `function(*arguments)` on `ranks` ranks; what each returned, in rank order.

    Raises AssertionError with the traceback of the first rank that failed, or naming those that did not end in time.
    """
    fresh = fresh or device != "cpu"
    pool = _Pool(kept=False) if fresh else _kept
    with tempfile.TemporaryDirectory() as folder:
        backend = backend or ("nccl" if device == "cuda" else "gloo")
        place = _Place(os.path.join(folder, "store"), ranks, timeout, device, backend)
        try:
            return pool.run(place, pickle.dumps((function, arguments)))  # by value: torch would share memory
        except BaseException:
            pool.end()
            raise
        finally:
            if fresh:
                pool.end()


def exit_statuses(function: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = 240.0) -> list[int]:
    """Run `function(*arguments)`, which ends its process, on fresh ranks without process groups; status of each.

    When one ends with another status than 0 the others are killed at once, as a launcher does.
    """
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        process = CONTEXT.Process(target=_alone, args=(rank, ranks, function, arguments), daemon=True)
        process.start()
        processes.append(process)
    deadline = time.monotonic() + timeout
    try:
        while left := [process for process in processes if process.exitcode is None]:
            if any(process.exitcode for process in processes):
                break
            assert wait([process.sentinel for process in left], deadline - time.monotonic()), f"not within {timeout} s"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in processes]


def _alone(rank: int, ranks: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _take_place(rank, ranks)
    function(*arguments)


def device() -> Any:
    """On a rank: the `torch.device` it is to compute on."""
    import torch

    return torch.device(os.environ[_DEVICE_VARIABLE])


@dataclass(frozen=True)
class _Place:
    """Where the ranks of one call meet."""

    store: str  # a path
    ranks: int
    timeout: float  # seconds, of the call and of its process groups
    device: str
    backend: str


class _Pool:
    """Processes that take one call after the other, the first ones as its ranks; unless `kept`, one call only."""

    def __init__(self, kept: bool) -> None:
        self._kept = kept
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, place: _Place, work: bytes) -> list[Any]:
        while len(self._processes) < place.ranks:
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        pipes = self._pipes[: place.ranks]
        for rank, pipe in enumerate(pipes):
            pipe.send_bytes(pickle.dumps((rank, place, work)))
        results = _collect(pipes, place.timeout)
        if not self._kept:
            return results
        for pipe in pipes:  # no rank closes its connections while a peer is still in a collective
            pipe.send_bytes(pickle.dumps("all have ended"))
        _collect(pipes, place.timeout)
        return results

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


_kept = _Pool(kept=True)
atexit.register(_kept.end)


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            raise AssertionError(f"ranks {late} did not end within {timeout:.0f} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                succeeded, value = False, "the process died and left no traceback"
            if not succeeded:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _serve(pipe: Connection) -> None:
    """On a rank: one call after the other, until one fails."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    import gc

    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what the server imported: a collection between calls need not go through it
    start = _State()
    try:
        while True:
            rank, place, work = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(pickle.dumps((True, _call(rank, place, work))))
            pipe.recv_bytes()
            start.restore()
            pipe.send_bytes(pickle.dumps((True, None)))
    except EOFError:  # the tests are over
        pass
    except BaseException:
        with suppress(OSError):
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
        os._exit(0)


def _take_place(rank: int, ranks: int) -> None:
    names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def _call(rank: int, place: _Place, work: bytes) -> Any:
    import torch
    import torch.distributed as dist

    _take_place(rank, place.ranks)
    device = torch.device("cpu")
    if place.device == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    os.environ[_DEVICE_VARIABLE] = str(device)
    dist.init_process_group(
        place.backend,
        init_method=f"file://{place.store}",
        rank=rank,
        world_size=place.ranks,
        timeout=timedelta(seconds=place.timeout),
        device_id=device if place.backend == "nccl" else None,  # as a run has it
    )
    function, arguments = pickle.loads(work)
    return function(*arguments)


class _State:
    """What a call may change in a process and the next one must find as it was."""

    def __init__(self) -> None:
        import torch

        self.environment = dict(os.environ)
        self.random = torch.get_rng_state()
        self.handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}

    def restore(self) -> None:
        import gc
        import sys

        import torch
        import torch._dynamo
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        deepspeed = sys.modules.get("deepspeed.comm.comm")
        assert deepspeed is None or deepspeed.cdb is None, "DeepSpeed keeps module globals: call with fresh=True"
        os.environ.clear()
        os.environ.update(self.environment)
        torch.set_rng_state(self.random)
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch._dynamo.reset()
        for number, handler in self.handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
        gc.collect()
