"""The one function that cuts a model: from a config and a mesh to an engine with initialised weights.

The order matters and stands here only: parts (pipeline) -> tensor parallel -> activation checkpointing -> compile ->
ZeRO -> memory -> initial values. Until ZeRO has cut it, the model lives on the meta device and costs nothing.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import nn

from conf.schema import Config
from conf.targets import import_target
from parallel.engine import Engine
from parallel.initialize import initialize
from parallel.layout import BatchPlan
from parallel.mesh import Mesh
from parallel.model import CuttableModel, whole_model
from parallel.native import build_native
from parallel.registry import uncut

log = logging.getLogger(__name__)


def cut(config: Config, mesh: Mesh, plan: BatchPlan) -> Engine:
    """The engine for `config` on this rank, its weights a function of (seed, names) only.

    `config.model.vocab_size` is known by now. Raises ValueError for a model target that cannot be imported.
    """
    with torch.device("meta"):
        model: CuttableModel = import_target(config.model.target)(config.model, whole_model(config.model.layers))
    assert isinstance(model, nn.Module)
    registry = uncut(model)
    parameters = sum(math.prod(entry.shape) for entry in registry.entries.values())
    log.info("model: %s, %s parameters", config.model.name, f"{parameters:,}")

    for block in model.blocks().values():
        _checkpoint_activations(block, config.activation_checkpoint)
        if config.compile:
            block.forward = torch.compile(block.forward)
    if config.activation_checkpoint != "none":
        log.info("activation checkpointing: %s, per block", config.activation_checkpoint)
    if config.compile:
        log.info("compile: per block")

    engine = build_native(config, mesh, plan, model, registry)
    log.info("layout: %s; %d micro-batches of %d rows per rank", mesh.layout, plan.micro_batches, plan.micro_rows)
    model.rebuild_buffers()
    initialize(engine.shards(), model.initial, config.run.seed)
    engine.shards_written()
    return engine


def _checkpoint_activations(block: nn.Module, mode: str) -> None:
    """Recompute a block's activations in backward: all of them (full), or all but the matrix products (selective)."""
    if mode == "none":
        return
    from torch.utils import checkpoint

    options: dict[str, Any] = {}
    if mode == "selective":
        kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]
        options["context_fn"] = functools.partial(checkpoint.create_selective_checkpoint_contexts, kept)
    block.forward = functools.partial(checkpoint.checkpoint, block.forward, use_reentrant=False, **options)
