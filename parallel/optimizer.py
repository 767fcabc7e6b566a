"""torch optimizers on local shards.

The optimizer sees plain tensors, one per parameter, at every ZeRO stage: on DTensors its host time is several
times higher. The scale that clips and normalises is handed to the fused kernels, which skip the update on the device
when `found_inf` is set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stoker.conf.schema import OptimConfig
from stoker.conf.targets import import_target
from stoker.parallel.model import Role

DECAYED = (Role.MATRIX, Role.HEAD)  # by default: not vectors (norms, biases) and embeddings
_DECOUPLED = "decoupled_decay"  # of a group: the share of lr x weight that `LocalOptimizer` itself takes off per step


class LocalOptimizer:
    """An optimizer over this rank's part of every parameter, its state made before the first step.

    `tensors` are the float32 local parts by global name, updated in place; a part may be empty. `roles` decide on
    weight decay.
    """

    def __init__(self, config: OptimConfig, tensors: dict[str, Tensor], roles: Mapping[str, Role]) -> None:
        self._parameters = {name: nn.Parameter(tensor) for name, tensor in tensors.items() if tensor.numel()}
        decayed = [n for n in self._parameters if config.decay_all or roles[n] in DECAYED]
        others = [n for n in self._parameters if n not in set(decayed)]
        # torch's SGD has no decoupled decay: what it calls weight decay goes through the velocity.
        own = config.target is None and config.name == "sgd"
        groups = [
            {"params": [self._parameters[n] for n in names]}
            | ({"weight_decay": 0.0, _DECOUPLED: decay} if own else {"weight_decay": decay})
            for names, decay in ((decayed, config.weight_decay), (others, 0.0))
            if names
        ]
        self._optimizer = _builder(config)(groups) if groups else None
        self._device = next(iter(self._parameters.values())).device if groups else torch.device("cpu")
        self._make_state(config.lr)

    def _make_state(self, lr: float) -> None:
        """Make the optimizer create its state: memory use is known before step 1, and a checkpoint can be read into it.

        A step of zero gradients on zero parameters leaves every moment at zero. The parameters are filled afterwards;
        while they are zero they also serve as gradients, so that building takes no more memory than training.
        """
        with torch.no_grad():
            for parameter in self._parameters.values():
                parameter.zero_()
        zeros = {name: parameter.detach() for name, parameter in self._parameters.items()}
        self.step(zeros, lr, torch.ones((), device=self._device), torch.zeros((), device=self._device))
        self.load_scalars(dict.fromkeys((key for _, key, _ in self._state() if key == "step"), 0.0))

    def step(self, gradients: dict[str, Tensor], lr: float, divisor: Tensor, found_inf: Tensor) -> None:
        """Update with `gradients / divisor` (float32, by name), or leave everything as it is where found_inf is 1."""
        optimizer = self._optimizer
        if optimizer is None:
            return
        for name, parameter in self._parameters.items():
            parameter.grad = gradients[name]
        divisor, found_inf = divisor.to(self._device), found_inf.to(self._device)  # waits if it is offloaded
        for group in optimizer.param_groups:
            group["lr"] = lr
            if decay := group.get(_DECOUPLED):  # as AdamW: before the update, and not at all if that is left out
                with torch.no_grad():
                    torch._foreach_mul_(group["params"], 1.0 - lr * decay * (1.0 - found_inf))
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = divisor, found_inf  # type: ignore[attr-defined]
            optimizer.step()
        elif not found_inf.item():  # an optimizer without fused kernels costs a synchronisation
            torch._foreach_div_([gradients[name] for name in self._parameters], divisor)
            optimizer.step()
        for parameter in self._parameters.values():
            parameter.grad = None

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """State of a parameter's own shape: (parameter's name, key, live tensor)."""
        for name, key, value in self._state():
            if key != "step":
                parameter = self._parameters[name]
                if not isinstance(value, Tensor) or value.shape != parameter.shape:
                    raise ValueError(
                        f"optimizer state {key!r} of {name} is not shaped like its parameter: it cannot be checkpointed"
                    )
                yield name, key, value

    def scalars(self) -> dict[str, float]:
        """State that is one number for all parameters, such as the count of updates in Adam's bias correction."""
        return {key: float(value) for _, key, value in self._state() if key == "step"}

    def load_scalars(self, values: dict[str, float]) -> None:
        """The inverse of `scalars`."""
        for name, key, value in self._state():
            if key in values and isinstance(value, Tensor):
                value.fill_(values[key])
            elif key in values:
                assert self._optimizer is not None
                self._optimizer.state[self._parameters[name]][key] = type(value)(values[key])

    def _state(self) -> list[tuple[str, str, Any]]:
        if self._optimizer is None:
            return []
        return [
            (name, key, value)
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state[parameter].items()
            if value is not None
        ]


def _builder(config: OptimConfig) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    if config.target is not None:
        build = import_target(config.target)
        return lambda groups: build(groups, lr=config.lr, **config.args)
    if config.name == "adamw":
        beta1, beta2 = config.betas
        return lambda groups: torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)
    assert config.name == "sgd", config.name  # `stoker.conf.limits` allows no other
    return lambda groups: torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
