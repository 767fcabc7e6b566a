"""Marks between the blocks of a model, in the log of a rehearsal: forward before each, backward behind each."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stoker.parallel.engine import Engine
from stoker.parallel.model import ParallelizableModel
from stoker.trainer.rehearsal.memory import Mark, MemoryLog


def mark_blocks(engine: Engine, log: MemoryLog) -> None:
    """From now on every pass of `engine` leaves its marks."""

    def passed(stage: int, number: int, values: Any) -> None:
        log.mark(Mark("forward", stage, number))
        tensor = next((leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)), None)
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            tensor.register_hook(lambda _: log.mark(Mark("backward", stage, number)))

    def enters(_: nn.Module, args: Any, kwargs: Any, at: tuple[int, int]) -> None:
        passed(*at, (args, kwargs))

    def leaves(_: nn.Module, args: Any, result: Any, at: tuple[int, int]) -> None:
        passed(*at, result)

    for place, stage in enumerate(engine.modules()):
        blocks = list(cast(ParallelizableModel, stage).blocks().values())
        for number, block in enumerate(blocks):
            hook = functools.partial(enters, at=(place, number))
            block.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        if blocks:
            blocks[-1].register_forward_hook(functools.partial(leaves, at=(place, len(blocks))))
