"""What does not go together with `parallel.engine=deepspeed`, or with its offload."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from stoker.parallel.deepspeed_engine.async_io import missing_for_async_io
from stoker.parallel.deepspeed_engine.settings import refused_settings
from stoker.parallel.start import Start


def _pipelines(start: Start) -> str | None:
    wanted = start.config.parallel
    if wanted.engine != "deepspeed" or wanted.pp == 1 or wanted.zero <= 1:
        return None
    return (
        f"parallel.engine=deepspeed with parallel.pp={wanted.pp} and parallel.zero={wanted.zero}: DeepSpeed cannot "
        "reduce and gather for several micro-batches under way; parallel.zero=1 works, or parallel.engine=fsdp"
    )


def _fp32_modules(start: Start) -> str | None:
    modules = start.config.fp32_modules
    if start.config.parallel.engine != "deepspeed" or not modules:
        return None
    return f"fp32_modules={modules} with parallel.engine=deepspeed: parallel.engine=fsdp works, or fp32_modules=[]"


def _compiled(start: Start) -> str | None:
    wanted = start.config.parallel
    if wanted.engine != "deepspeed" or wanted.zero != 3 or not start.config.compile:
        return None
    return (
        "compile=true with parallel.engine=deepspeed and parallel.zero=3: parallel.zero=2 works, or "
        "parallel.engine=fsdp, or compile=false"
    )


def _selective(start: Start) -> str | None:
    wanted = start.config.parallel
    if wanted.engine != "deepspeed" or wanted.zero != 3 or start.config.activation_checkpointing != "selective":
        return None
    return (
        "activation_checkpointing=selective with parallel.engine=deepspeed and parallel.zero=3: "
        "activation_checkpointing=full works, or parallel.zero=2, or parallel.engine=fsdp"
    )


def _experts(start: Start) -> str | None:
    wanted = start.config.parallel
    if wanted.engine != "deepspeed" or wanted.ep <= 1:
        return None
    return (
        f"parallel.ep={wanted.ep} with parallel.engine=deepspeed: parallel.ep=1 works, with all experts on every rank, "
        "or parallel.engine=fsdp"
    )


def _settings(start: Start) -> str | None:
    wanted = start.config.parallel
    if wanted.engine != "deepspeed":
        return "parallel.deepspeed: these settings are for parallel.engine=deepspeed" if wanted.deepspeed else None
    return "\n".join(refused_settings(wanted.deepspeed)) or None


def _nvme(start: Start) -> str | None:
    wanted = start.config.parallel
    if wanted.offload != "nvme":
        return None
    if wanted.engine != "deepspeed":
        return (
            f"parallel.offload=nvme with parallel.engine={wanted.engine}: parallel.engine=deepspeed with "
            "parallel.nvme_path=DIRECTORY on a local disk works, or parallel.offload=cpu"
        )
    if wanted.nvme_path is None:
        return (
            "parallel.offload=nvme needs parallel.nvme_path=DIRECTORY on a local disk; parallel.offload=cpu needs none"
        )
    try:
        Path(wanted.nvme_path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=wanted.nvme_path).close()
    except OSError as error:
        return f"parallel.nvme_path={wanted.nvme_path}: {error.strerror}; name another, or parallel.offload=cpu works"
    if wanted.zero != 3:
        return None
    for name in wanted.deepspeed.get("zero_optimization") or ():
        if name.removeprefix("stage3_") in ("prefetch_bucket_size", "max_reuse_distance"):
            return (
                f"parallel.deepspeed.zero_optimization.{name} with parallel.offload=nvme: DeepSpeed does not "
                "free the buffers of what it has read ahead or keeps, and runs out of them; leave it out"
            )
    missing = missing_for_async_io()
    if missing is not None:
        return (
            f"parallel.offload=nvme with parallel.zero=3: DeepSpeed's async IO cannot be built here, {missing}; "
            "parallel.zero=2 does without, or parallel.offload=cpu"
        )
    return None


ENTRIES: tuple[tuple[str, str, str, Callable[[Start], str | None]], ...] = (
    (
        "DeepSpeed and pipelines",
        "parallel.engine=deepspeed with parallel.pp > 1 and parallel.zero > 1",
        "its ZeRO 2 and 3 reduce and gather within one backward at a time, and ZeRO 3 synchronises all ranks of the "
        "job",
        _pipelines,
    ),
    (
        "DeepSpeed and fp32 modules",
        "parallel.engine=deepspeed with fp32_modules",
        "it keeps parameters of one dtype, flattened together",
        _fp32_modules,
    ),
    (
        "DeepSpeed ZeRO 3 and compile",
        "parallel.engine=deepspeed with parallel.zero=3 and compile=true",
        "the hooks that gather parameters run inside the blocks that would be compiled",
        _compiled,
    ),
    (
        "DeepSpeed ZeRO 3 and selective checkpointing",
        "parallel.engine=deepspeed with parallel.zero=3 and activation_checkpointing=selective",
        "recomputing a block gathers its parameters again, and that operation is not among the saved ones",
        _selective,
    ),
    (
        "DeepSpeed and expert parallelism",
        "parallel.engine=deepspeed with parallel.ep above 1",
        "its ZeRO shards and sums all parameters over the same ranks, but those of its own MoE layer",
        _experts,
    ),
    (
        "NVMe",
        "parallel.offload=nvme with another engine, without a parallel.nvme_path that can be written, or at ZeRO 3 "
        "where libaio is missing",
        "only DeepSpeed swaps parameters to NVMe, through libaio",
        _nvme,
    ),
    (
        "DeepSpeed settings",
        "in parallel.deepspeed what another key decides; parallel.deepspeed with another engine",
        "a value is set in one place",
        _settings,
    ),
)
