"""An out-of-memory error in terms of the config: what asked for the memory, and the nearest settings that need less.

What a setting needs is estimated by counting bytes (`stoker.trainer.need`), and corrected by what this run needed when
it failed.
"""

from __future__ import annotations

import dataclasses
import re
import resource
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from stoker.conf.ramp import unit_rows
from stoker.conf.reasons import root_cause
from stoker.conf.schema import Config, ModelConfig
from stoker.models.loss import CHUNK
from stoker.parallel.layout import OF_TOKENS, batch_plan, layout_of
from stoker.trainer.loss_chunk import on_gpus
from stoker.trainer.memory import available_bytes
from stoker.trainer.need import MARGIN, need_of

SIGNS = (  # of errors that are no torch.OutOfMemoryError
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Failed to CUDA calloc",  # NCCL's buffers
    "DefaultCPUAllocator: can't allocate memory",
    "could not be locked for copies to the GPU",
)
COMPONENTS = (  # by the innermost file of the traceback that is named here
    ("parallel/optimizer.py", "the optimizer's state"),
    ("parallel/pinned.py", "page-locked memory of the host"),
    ("checkpoint/staging.py", "the staging pool of checkpoints"),
    ("models/loss.py", "the loss"),
    ("models/cpu_attention.py", "attention"),
    ("models/attention.py", "attention"),
    ("models/decoder.py", "the forward pass"),
    ("autograd/graph.py", "the backward pass"),
    ("fsdp/_fully_shard/_fsdp_collectives.py", "gathered parameters and their gradients"),
    ("parallel/sharding.py", "the parameters"),
    ("parallel/replicated.py", "the parameters and gradients"),
    ("parallel/sharded.py", "the parameters"),
)


def is_out_of_memory(error: BaseException) -> bool:
    root = root_cause(error)
    if isinstance(root, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(root, RuntimeError) and any(sign in str(root) for sign in SIGNS)


def component_of(error: BaseException) -> str:
    """What asked for the memory, by the frames of the error's traceback."""
    frames = traceback.extract_tb(root_cause(error).__traceback__)
    for frame in reversed(frames):
        for file, component in COMPONENTS:
            if frame.filename.endswith(f"/{file}"):
                return component
    return "this rank"


def nearest_that_fit(
    config: Config, world: int, parameters: int, capacity: float, needed: float, frozen: int = 0
) -> list[str]:
    """At most two settings, the least intrusive first, that are estimated to fit into `capacity` bytes of the device.

    `needed` are bytes that the present config asked for at least when it failed.
    """
    now = need_of(config, layout_of(config, world), parameters, frozen)
    correction = max(1.0, (needed - now.held) / max(now.activations, 1.0))
    found = []
    for words, changed in _changes(config, world):
        try:
            need = need_of(changed, layout_of(changed, world), parameters, frozen)
        except ValueError:  # does not divide
            continue
        if need.held + need.activations * correction <= MARGIN * capacity:
            found.append(words)
    return found[:2]


def _changes(config: Config, world: int) -> Iterator[tuple[str, Config]]:
    """Settings that need less memory than the present ones, the least intrusive first."""
    layout = layout_of(config, world)
    plan, rows = batch_plan(config, layout), unit_rows(config) // layout.dp
    smaller = [n for n in range(plan.micro_rows - 1, 0, -1) if rows % n == 0]
    modes = {"none": ("selective", "full"), "selective": ("full",)}.get(config.activation_checkpointing, ())
    stages = range(config.parallel.zero + 1, 4) if layout.size(OF_TOKENS) > 1 else ()

    def with_(section: str | None, **values: object) -> Config:
        if section is None:
            return dataclasses.replace(config, **values)  # type: ignore[arg-type]
        inner = dataclasses.replace(getattr(config, section), **values)
        return dataclasses.replace(config, **{section: inner})

    if (config.model.loss_chunk or CHUNK) > CHUNK:
        yield f"model.loss_chunk={CHUNK}", with_("model", loss_chunk=CHUNK)
    for rows in smaller[:1]:
        yield f"batch.micro_size={rows}", with_("batch", micro_size=rows)
    for mode in modes:
        yield f"activation_checkpointing={mode}", with_(None, activation_checkpointing=mode)
    for rows in smaller[1:]:
        yield f"batch.micro_size={rows}", with_("batch", micro_size=rows)
    for stage in stages:
        yield f"parallel.zero={stage}", with_("parallel", zero=stage, dp_replicate=None)
    if modes and smaller:
        least = dataclasses.replace(with_("batch", micro_size=1), activation_checkpointing="full")
        yield "batch.micro_size=1 activation_checkpointing=full", least
    if config.parallel.offload == "none":
        yield "parallel.offload=cpu", with_("parallel", offload="cpu")


def explain(error: BaseException, config: Config, world: int, device: torch.device) -> str:
    """The error in one line: the component, the bytes, and settings that are estimated to fit."""
    requested, held, capacity = _requested(error), _held(device), _capacity(device)
    line = f"out of memory in {component_of(error)}"
    if requested:
        line += f": {_gib(requested)} more than the {_gib(held)} that this rank held of {_gib(capacity)}"
    if config.model.target != ModelConfig().target:  # its shape is not in the config
        settings = [words for words, _ in _changes(config, world)][:2]
        return f"{line}; settings that need less: {', or '.join(settings)}" if settings else line
    from stoker.trainer.facts import Facts, vocabulary_of  # most failures do not need their imports
    from stoker.trainer.parallelize import trained_and_frozen

    complete = Facts(vocabulary_of(config), bool(config.data.document_mask)).complete(config)
    trained, frozen = trained_and_frozen(complete)
    if device.type == "cuda":  # as if the smallest GPU of the run were this rank's: no other can be asked now
        complete = on_gpus(complete, layout_of(complete, world), capacity, trained + frozen, frozen)
    settings = nearest_that_fit(complete, world, trained + frozen, capacity, held + requested, frozen)
    if not settings:
        more = "more ranks, with parallel.zero=3 or a larger parallel.tp, share the parameters"
        return f"{line}; no single setting is estimated to fit: {more}"
    return f"{line}; estimated to fit: {', or '.join(settings)}"


def _requested(error: BaseException) -> float:
    text = str(root_cause(error))
    if found := re.search(r"tried to allocate (\d+) bytes", text):
        return float(found[1])
    if found := re.search(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", text):
        return float(found[1]) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[found[2]]
    return 0.0


def _held(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return float(pages * resource.getpagesize())


def _capacity(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return _held(device) + (available_bytes() or 0)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
