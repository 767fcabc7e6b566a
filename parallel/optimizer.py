"""torch optimizers on local shards: AdamW, SGD, and a user's that treats each element separately.

The optimizer sees plain tensors, one per parameter, at every ZeRO stage: on DTensors its host time is several
times higher. The scale that clips and normalises is handed to the fused kernels, which skip the update on the device
when `found_inf` is set.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stoker.conf.schema import OptimConfig
from stoker.conf.targets import import_target
from stoker.parallel.model import Role
from stoker.parallel.rules.settings import TARGET, Settings, settings_of

_DECOUPLED = "decoupled_decay"  # of a group: the share of lr x weight that `LocalOptimizer` itself takes off per step
_RATE = "rate"  # of a group: what the step's learning rate is multiplied by, if not 1


def _without_compiler(step: Callable[..., Any]) -> Callable[..., Any]:
    """The `step` of a class of `torch.optim`, less the decorator that loads the compiler to break graphs there.

    What else the decorator does is kept: an update is recorded for gradients only with `differentiable=True`.
    """
    plain = inspect.unwrap(step)

    @functools.wraps(plain)
    def eager(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, closure)

    return eager


# torch's, which no graph contains here: to mark them for the compiler would load it, 800 modules and more than a second
# of a processor at the start of each rank. `fully_shard` and activation checkpointing do: torch reads settings there.
class AdamW(torch.optim.AdamW):
    step = _without_compiler(torch.optim.AdamW.step)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)


class SGD(torch.optim.SGD):
    step = _without_compiler(torch.optim.SGD.step)
    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)


class LocalOptimizer:
    """An optimizer over this rank's part of every parameter, its state made before the first step.

    `tensors` are the float32 local parts by global name, updated in place; a part may be empty. `settings` are theirs,
    all of one rule of torch's; by default they follow from `roles` and the shapes of the parts.
    """

    def __init__(
        self,
        config: OptimConfig,
        tensors: Mapping[str, Tensor],
        roles: Mapping[str, Role],
        settings: Mapping[str, Settings] | None = None,
    ) -> None:
        self._parameters = {name: nn.Parameter(tensor) for name, tensor in tensors.items() if tensor.numel()}
        alike: dict[Settings, list[str]] = {}
        for name, parameter in self._parameters.items():
            own = settings[name] if settings is not None else settings_of(config, name, roles[name], parameter.dim())
            alike.setdefault(own, []).append(name)
        groups = [_group(own, [self._parameters[n] for n in names]) for own, names in alike.items()]
        self._optimizer = _builder(config, next(iter(alike)).rule)(groups) if groups else None
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

    def begin(self, gradients: Mapping[str, Tensor], lr: float, divisor: Tensor, found_inf: Tensor) -> None:
        """See `step`, which is over at once: there is nothing to wait for."""
        self.step(gradients, lr, divisor, found_inf)

    def finish(self) -> None:
        pass

    def step(self, gradients: Mapping[str, Tensor], lr: float, divisor: Tensor, found_inf: Tensor) -> None:
        """Update with `gradients / divisor` (float32, by name), or leave everything as it is where found_inf is 1."""
        optimizer = self._optimizer
        if optimizer is None:
            return
        for name, parameter in self._parameters.items():
            parameter.grad = gradients[name]
        divisor, found_inf = divisor.to(self._device), found_inf.to(self._device)  # waits if it is offloaded
        for group in optimizer.param_groups:
            group["lr"] = rate = lr * group.get(_RATE, 1.0)
            if decay := group.get(_DECOUPLED):  # as AdamW: before the update, and not at all if that is left out
                with torch.no_grad():
                    torch._foreach_mul_(group["params"], 1.0 - rate * decay * (1.0 - found_inf))
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


def _group(own: Settings, parameters: list[nn.Parameter]) -> dict[str, Any]:
    """A parameter group for torch."""
    group: dict[str, Any] = {"params": parameters, "weight_decay": own.decay}
    if own.rate != 1.0:
        group[_RATE] = own.rate
    if own.rule == "adamw":
        group |= {"betas": own.betas, "eps": own.eps}
    elif own.rule == "sgd":  # torch's has no decoupled decay: what it calls weight decay goes through the velocity
        group |= {"weight_decay": 0.0, _DECOUPLED: own.decay, "momentum": own.momentum}
    return group


def _builder(config: OptimConfig, rule: str) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    if rule == TARGET:
        assert config.target is not None
        build = import_target(config.target)
        return lambda groups: build(groups, lr=config.lr, **config.args)
    if rule == "adamw":
        return lambda groups: AdamW(groups, lr=config.lr, fused=True)
    assert rule == "sgd", rule
    return lambda groups: SGD(groups, lr=config.lr, fused=True)
