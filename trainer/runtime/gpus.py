"""The GPU of a rank: which one it takes, that no other rank has it, and the environment of NCCL.

Whether a launcher shows every rank all GPUs of its machine or each its own, the number of GPUs that a rank sees does
not tell whether two ranks have the same one. Their UUIDs do: all ranks exchange them before NCCL connects.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from stoker.conf.schema import Config
from stoker.conf.user import cache_folder
from stoker.conf.values import ConfigError
from stoker.parallel.devices import backend_of, gpu_of, pick_device
from stoker.parallel.start import Ranks
from stoker.trainer.runtime.process import Place

# What torch's NCCL groups read when they are made; a value that the user has set stays.
NCCL_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # end the process after an error or a timeout, without waiting for kernels
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # of the flight recorder, for the case that our own watchdog is gone
    "TORCH_NCCL_ENABLE_MONITORING": "1",  # end the process if NCCL's own watchdog thread is stuck,
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "1800",  # but not before ours has reported: its limit is 1200 s or more
}
COMPILED_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
TRACE_VARIABLE = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"  # where that dump goes; the rank's number is appended


def ranks_of(config: Config, place: Place) -> Ranks:
    """The ranks that another launcher has started, as the one at `place` sees them."""
    gpus = 0 if config.launch.device == "cpu" else torch.cuda.device_count()
    return Ranks(place.world, gpus, min(place.world, place.local_world), one_each=True)


def take_device(config: Config, place: Place, store: dist.Store) -> tuple[torch.device, str | None]:
    """This rank's device, current in this thread, and the name of a GPU with its host. A collective over `store`.

    Raises ConfigError, on all ranks, where two ranks have one GPU and are to communicate over NCCL.
    """
    device = pick_device(config.launch.device, place.local_rank, place.local_world, config.launch.backend)
    gpu, host = gpu_of(device), socket.gethostname()
    if place.world > 1 and backend_of(config.launch.backend, device) == "nccl":
        refuse_shared_gpus(store, place, gpu or "", host)
    return device, None if gpu is None else f"{gpu} on {host}"


def refuse_shared_gpus(store: dist.Store, place: Place, gpu: str, host: str) -> None:
    """Raises ConfigError, on all ranks, if two of them have the same `gpu` (its UUID)."""
    store.set(f"stoker/gpu/{place.rank}", json.dumps([host, gpu]))
    if place.rank == 0:
        owners = [tuple(json.loads(store.get(f"stoker/gpu/{rank}"))) for rank in range(place.world)]
        store.set("stoker/gpus", shared_gpus(owners) or "")
    problem = store.get("stoker/gpus").decode()
    if problem:
        raise ConfigError(problem)


def shared_gpus(owners: Sequence[tuple[str, str]]) -> str | None:
    """What is wrong with the host and GPU of each rank, in one line."""
    first: dict[tuple[str, str], int] = {}
    for rank, owner in enumerate(owners):
        other = first.setdefault(owner, rank)
        if other != rank:
            host, gpu = owner
            return (
                f"ranks {other} and {rank} on {host} have the same GPU {gpu}, and NCCL needs one for each rank: set "
                "LOCAL_RANK and LOCAL_WORLD_SIZE as torchrun does, or show each rank its own GPU "
                "(CUDA_VISIBLE_DEVICES, srun --gpus-per-task=1); launch.backend=gloo lets ranks share one, for tests"
            )
    return None


def set_environment(attempt: Path) -> None:
    """Before groups are made and anything is compiled: `NCCL_ENVIRONMENT`, dumps into the folder of the attempt, and a
    place for compiled kernels that outlives the run. It is this user's own: what is in it is run."""
    places = {TRACE_VARIABLE: attempt / "nccl-trace-", COMPILED_VARIABLE: cache_folder() / "compiled"}
    for variable, value in {**NCCL_ENVIRONMENT, **places}.items():
        os.environ.setdefault(variable, str(value))
