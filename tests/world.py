"""Ranks for tests: processes forked from a server that has torch imported, with short timeouts.

    results = world.run(function, 4, argument)      # function(mesh-less) runs on 4 ranks; results in rank order

They talk over gloo, and with `device="cuda"` over NCCL, each with a GPU of its own; `world.device()` says on a rank
which device is its own.

`function` is module-level and runs after the default process group exists. A failing rank's traceback becomes the
assertion's message; ranks that outlive the timeout are killed and named.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

# A server that has run no tensor code can fork safely; it pays for the imports once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "stoker.parallel.sharded",
        "stoker.parallel.pipeline",
        "stoker.trainer.main",
        "stoker.trainer.import_check",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.qwen3.modeling_qwen3",
        "deepspeed",
        "deepspeed.runtime.zero.muon.muon_optimizer",
    ]
)

PR_SET_PDEATHSIG = 1


def run(
    function: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    timeout: float = 60.0,
    device: str = "cpu",
    group: bool = True,
) -> list[Any]:
    """Run `function(*arguments)` on `ranks` ranks; what each returned, in rank order.

    Without `group` they only know their place, and make the default process group themselves. Raises AssertionError
    with the traceback of the first rank that failed, or naming those that did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = _context.Pipe(duplex=False)
            work = (theirs, os.path.join(folder, "store"), rank, ranks, timeout, device, group, function, arguments)
            process = _context.Process(target=_rank, args=work, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


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
                succeeded, value = False, "the process died without a word"
            if not succeeded:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def device() -> Any:
    """On a rank: the `torch.device` it is to compute on."""
    import torch
    import torch.distributed as dist

    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _rank(
    pipe: Connection,
    store: str,
    rank: int,
    ranks: int,
    timeout: float,
    device: str,
    group: bool,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in place.items()}
    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        if group:
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=timeout),
            )
        pipe.send_bytes(pickle.dumps((True, function(*arguments))))  # by value: torch would share memory
        if group:
            dist.barrier()  # nobody leaves while a peer still needs it
            dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
        os._exit(0)
