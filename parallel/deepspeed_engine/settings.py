"""DeepSpeed's settings: what follows from our config, and what `parallel.deepspeed` may add to it.

`parallel.deepspeed` is a part of DeepSpeed's JSON, with its names. This module imports nothing of DeepSpeed, so that
the config can be checked before a rank exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.conf.overrides import closest
from stoker.conf.schema import Config
from stoker.parallel.layout import BatchPlan

# Its buckets are allocated whole, 5e8 elements by default: no larger than the model needs.
BUCKET_NUMEL = 50_000_000

# Of parameters on NVMe: parts of them that are in memory at one time, and elements that are written back at one time.
SWAP_BUFFERS = 5
SWAP_NUMEL = 50_000_000

# What may be set. A test compares the names with the release that is installed.
PASSED_ON = ("aio", "comms_logger", "dump_state", "memory_breakdown", "wall_clock_breakdown", "zero_optimization")
ZERO_PASSED_ON = (
    "allgather_bucket_size",
    "allgather_sequential",
    "contiguous_gradients",
    "enable_sanity_checks",
    "log_trace_cache_warnings",
    "max_live_parameters",
    "max_reuse_distance",
    "memory_efficient_linear",
    "model_persistence_threshold",
    "module_granularity_threshold",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "param_persistence_threshold",
    "prefetch_bucket_size",
    "reduce_bucket_size",
    "reduce_scatter",
    "sub_group_size",
    "use_all_reduce_for_fetch_params",
    "use_multi_rank_bucket_allreduce",
)
OFFLOAD_PASSED_ON = ("buffer_count", "buffer_size", "fast_init", "pin_memory", "pipeline_read", "pipeline_write")

# Settings that decide the numbers of a run or its sharding, and where they are set. Names of `zero_optimization` after
# a dot.
SUMS = "nowhere: gradients are summed in fp32"
OWNED = {
    "activation_checkpointing": "activation_checkpointing",
    "amp": "precision",
    "bf16": "precision",
    "bfloat16": "precision",
    "checkpoint": "checkpoint.*",
    "communication_data_type": SUMS,
    "compile": "compile",
    "csv_monitor": "tracker",
    "data_efficiency": "data.*",
    "data_types": SUMS,
    "flops_profiler": "profile.*",
    "fp16": "precision",
    "gradient_accumulation_steps": "batch.size and batch.micro_size",
    "gradient_allreduce_op": SUMS,
    "gradient_clipping": "grad_clip_norm",
    "gradient_predivide_factor": SUMS,
    "managed_gradient_accumulation": "batch.size and batch.micro_size",
    "optimizer": "optim",
    "pipeline": "parallel.pp",
    "prescale_gradients": SUMS,
    "scheduler": "schedule",
    "seed": "run.seed",
    "sequence_parallel_size": "parallel.sequence_parallel",
    "tensor_parallel": "parallel.tp",
    "tensorboard": "tracker",
    "torch_autocast": "precision",
    "train_batch_size": "batch.size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "wandb": "tracker",
    "zero_optimization.cpu_offload": "parallel.offload",
    "zero_optimization.cpu_offload_param": "parallel.offload",
    "zero_optimization.parameter_alignment": "nowhere: checkpoints follow the layout without it",
    "zero_optimization.round_robin_gradients": "nowhere: checkpoints follow the layout without it",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.zero_hpz_partition_size": "parallel.dp_replicate",
    "zero_optimization.zero_quantized_gradients": SUMS,
    "zero_optimization.zero_quantized_weights": "precision",
    **{f"zero_optimization.{part}.device": "parallel.offload" for part in ("offload_optimizer", "offload_param")},
    **{f"zero_optimization.{part}.nvme_path": "parallel.nvme_path" for part in ("offload_optimizer", "offload_param")},
}


def refused_settings(wanted: dict[str, Any]) -> Iterator[str]:
    """A message for each setting in `parallel.deepspeed` that is not passed on."""
    yield from _refused("", wanted, PASSED_ON)
    zero = wanted.get("zero_optimization")
    if not isinstance(zero, dict):
        if zero is not None:
            yield f"parallel.deepspeed.zero_optimization={zero}: expected settings such as {{overlap_comm:true}}"
        return
    plain = {name.removeprefix("stage3_"): value for name, value in zero.items()}
    yield from _refused("zero_optimization.", plain, ZERO_PASSED_ON)
    for part in ("offload_optimizer", "offload_param"):
        if isinstance(plain.get(part), dict):
            yield from _refused(f"zero_optimization.{part}.", plain[part], OFFLOAD_PASSED_ON)


def _refused(prefix: str, wanted: dict[str, Any], known: tuple[str, ...]) -> Iterator[str]:
    for name in wanted:
        key = f"parallel.deepspeed.{prefix}{name}"
        where = OWNED.get(prefix + name)
        if name in known:
            continue
        if where is None:
            yield f"{key} is not passed on to DeepSpeed; these are: {', '.join(closest(name, list(known)))}"
        elif where.startswith("nowhere"):
            yield f"{key} cannot be set: {where.removeprefix('nowhere: ')}"
        else:
            yield f"{key} is set by Stoker: use {where}"


@dataclass(frozen=True)
class Swap:
    """Parameters on NVMe: the folder of this process, and the elements of the largest part that it holds of one."""

    folder: Path
    part_numel: int


def settings(config: Config, plan: BatchPlan, trained: int, cuda: bool, swap: Swap | None = None) -> dict[str, Any]:
    """What `deepspeed.initialize` takes as its config; `trained` counts the elements that this rank's module trains."""
    stage = max(1, config.parallel.zero)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": max(1024, min(BUCKET_NUMEL, trained)),
        "overlap_comm": False if config.parallel.pp > 1 or not cuda else stage > 1,
    }
    if config.parallel.offload != "none":  # to NVMe too: then what DeepSpeed takes for memory is mapped from there
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda and config.parallel.offload == "cpu"}
    if swap is not None:
        zero |= _swapped(swap, cuda)
    elif config.parallel.offload != "none" and stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_rows,
        "gradient_accumulation_steps": 1,  # accumulation, clipping and scaling of losses are ours
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "sum" if stage < 3 else "mean",  # ZeRO 3 has no sum
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if config.precision in ("bf16", "fp8"):
        found["bf16"] = {"enabled": True, "immediate_grad_update": True}
    if config.precision == "fp16":
        found["fp16"] = {"enabled": True, "loss_scale": 1.0}
    asked = config.parallel.deepspeed.get("zero_optimization") or {}
    plain = {
        name.removeprefix("stage3_"): value for name, value in asked.items()
    }  # DeepSpeed must see one of two names
    return _merged(found, {**config.parallel.deepspeed, "zero_optimization": plain})


def _swapped(swap: Swap, cuda: bool) -> dict[str, Any]:
    """Parameters on NVMe, each read when it is used, so that a few buffers do.

    A parameter that is read ahead or kept for its next use holds a buffer, and DeepSpeed aborts when no buffer is free:
    a forward without a backward, as in an evaluation, keeps the buffers of what it has read ahead.
    """
    return {
        "offload_param": {
            "device": "nvme",
            "nvme_path": str(swap.folder),
            "buffer_count": SWAP_BUFFERS,
            "buffer_size": swap.part_numel,
            "max_in_cpu": 0,
            "pin_memory": cuda,
        },
        "sub_group_size": SWAP_NUMEL,
        "prefetch_bucket_size": 0,
        "max_reuse_distance": 0,
    }


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
