"""Frozen parameters are stored in the dtype that they compute in.

A master in float32 is there for updates that are smaller than a compute copy can hold. What is never updated has none:
it is rounded once, when it is read, and takes the bytes of the compute dtype, without gradients or optimizer state.
The dtype is that of the parameter's record and of the parameter itself, so that sharding strategies, checkpoints and
rehearsals need no case for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from stoker.parallel.registry import Registry
from stoker.parallel.sharding import replace_parameters


def store_frozen(
    stages: Sequence[nn.Module], full: Sequence[Sequence[nn.Module]], registry: Registry, dtype: torch.dtype
) -> Registry:
    """Put parameters of `dtype` in the place of the frozen ones of `stages`, on the meta device or not.

    Those of the modules `full` of each stage, which compute in float32, stay as they are. Returns `registry` with the
    dtypes in which parameters are stored now.
    """
    entries = dict(registry.entries)
    for stage, modules in zip(stages, full, strict=True):
        kept = {parameter for module in modules for parameter in module.parameters()}

        def stored(name: str, old: nn.Parameter, kept: set[nn.Parameter] = kept) -> nn.Parameter:
            if old.requires_grad or old in kept:
                return old
            entries[name] = replace(entries[name], dtype=dtype)
            return nn.Parameter(old.detach().to(dtype), requires_grad=False)

        if dtype != torch.float32:
            replace_parameters(stage, stored)
    return Registry(entries.values())
