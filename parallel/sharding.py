"""What the engine asks of a store of weights: `replicated`, `sharded` and `deepspeed_engine` are the three."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from stoker.parallel.registry import LocalShard


@dataclass(frozen=True)
class Precision:
    """What a store computes in. `full` are modules that compute in float32 whatever the rest does."""

    dtype: torch.dtype
    full: tuple[nn.Module, ...] = ()


class ShardingStrategy(Protocol):
    """Parameters of one stage in float32 (the truth), copies to compute with, and gradients summed in float32."""

    module: nn.Module  # the stage, as it is to be called
    held: dict[str, LocalShard]  # by global name: which part of the module's tensor this rank updates
    tensors: dict[str, Tensor]  # by global name: that part, float32, live

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
    """Give real, uninitialised memory to parameters and buffers that are still on the meta device."""
    replace_parameters(
        module,
        lambda _, old: nn.Parameter(torch.empty_like(old, device=device), old.requires_grad) if old.is_meta else old,
    )
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(part, name, torch.empty_like(buffer, device=device))
