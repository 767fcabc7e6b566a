"""The protocol of a sharding strategy: `replicated`, `sharded` and `deepspeed_engine` implement it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from stoker.parallel.registry import LocalShard


@dataclass(frozen=True)
class Precision:
    """The compute dtype of a strategy. `full` are modules that always compute in float32."""

    dtype: torch.dtype
    full: tuple[nn.Module, ...] = ()


class ShardingStrategy(Protocol):
    """Parameters of one stage, compute copies of them, and gradients summed in float32.

    Trained parameters are held in float32 (the masters); frozen ones in the dtype that the parameters of the given
    module have, in which they compute.
    """

    module: nn.Module  # the stage, as callers use it
    held: dict[str, LocalShard]  # by global name: which part of the module's tensor this rank updates
    tensors: dict[str, Tensor]  # by global name: that part, live

    def on_backward_start(self, *, is_last: bool) -> None:
        """The backward of a micro-batch is next; `last` says that its gradients complete the step's."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """After the last micro-batch: the summed float32 gradients of those `tensors` that are trained, live.

        Waits for reductions in flight.
        """
        ...

    def on_optimizer_step(self) -> None:
        """`tensors` have changed: drop the gradients and renew what is derived."""
        ...


def replace_parameters(model: nn.Module, make: Callable[[str, nn.Parameter], nn.Parameter]) -> dict[str, nn.Parameter]:
    """Put `make(name, old)` in the place of every parameter, tied ones once and in all their places."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    named = {}
    for name, old in model.named_parameters():
        named[name] = new[old] = make(name, old)
    for module in model.modules():
        for attribute, old_parameter in module.named_parameters(recurse=False):
            setattr(module, attribute, new[old_parameter])
    return named


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give memory to parameters and buffers that are still on the meta device, and move other buffers to `device`.

    Parameters are uninitialised. Buffers hold the value by which `is_untouched` recognises them.
    """
    replace_parameters(
        module,
        lambda _, old: nn.Parameter(torch.empty_like(old, device=device), old.requires_grad) if old.is_meta else old,
    )
    made: dict[Tensor, Tensor] = {}  # shared ones stay shared
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta and buffer not in made:
                made[buffer] = torch.full_like(buffer, _untouched(buffer.dtype), device=device)
            setattr(part, name, made[buffer] if buffer in made else buffer.to(device))


def is_untouched(buffer: Tensor) -> bool:
    """Whether `buffer` holds nothing but what `materialise` filled it with. No fake tensor does: it has no values."""
    if isinstance(buffer, FakeTensor):
        return False
    value = _untouched(buffer.dtype)
    same = buffer.isnan() if isinstance(value, float) else buffer == value
    return buffer.numel() > 0 and bool(same.all())


def _untouched(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    if dtype == torch.bool:
        return True
    limits = torch.iinfo(dtype)
    return limits.max if limits.min == 0 else limits.min
