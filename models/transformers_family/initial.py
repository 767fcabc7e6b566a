"""Initial distributions and buffers of transformers' models, by their own code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stoker.parallel.model import Constant, Normal

Rules = dict[str, Normal | Constant | str]  # by global name; a text is the reason why there is none


class _Recorder(TorchFunctionMode):
    """The last in-place operation on each parameter."""

    def __init__(self, parameters: dict[int, str]) -> None:
        self._parameters = parameters
        self.rules: Rules = {}

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        given = dict(named or {})
        target = arguments[0] if arguments else given.pop("tensor", None)  # torch.nn.init passes it by name
        name = getattr(function, "__name__", "")
        if isinstance(target, Tensor) and id(target) in self._parameters and _is_in_place(name):
            self.rules[self._parameters[id(target)]] = _rule(name, arguments[1:], given)
            return target
        return function(*arguments, **(named or {}))


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_") and name not in ("requires_grad_", "detach_")


def _rule(name: str, values: tuple[Any, ...], named: dict[str, Any]) -> Normal | Constant | str:
    if name == "normal_":
        mean, std = [
            *values,
            *[named.get(key, default) for key, default in (("mean", 0.0), ("std", 1.0))][len(values) :],
        ]
        return Normal(float(std)) if mean == 0 else f"a normal distribution of mean {mean}"
    if name in ("zero_", "zeros_", "ones_"):
        return Constant(float(name == "ones_"))
    if name in ("fill_", "constant_"):
        value = values[0] if values else named.get("value", named.get("val"))
        return Constant(float(value)) if isinstance(value, (int, float)) else "values of a tensor"
    return f"{name} of torch"


def initial_rules(causal: Any) -> Rules:
    """What transformers' own initialisation of `causal` (on the meta device) does to each parameter.

    The row of a padding token is not set to zero: Stoker trains it as all others.
    """
    names = {id(parameter): name for name, parameter in causal.named_parameters()}
    recorder = _Recorder(names)
    with recorder, torch.no_grad():
        causal.initialize_weights()
    return {name: recorder.rules.get(name, "transformers initialises it nowhere") for name in names.values()}


@contextlib.contextmanager
def buffers_only() -> Iterator[None]:
    """Models built in here have buffers with values, and parameters without memory."""
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        with no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Give the buffers of `target` the values of those of `source` of the same names, on their devices.

    Tensors that are plain attributes of a module are no buffers to torch: they are copied as well.
    """
    modules = dict(source.named_modules())
    for name, module in target.named_modules():
        fresh = modules.get(name)
        if fresh is None:
            continue
        for key, buffer in module._buffers.items():
            value = fresh._buffers.get(key)
            if buffer is not None and value is not None:
                module._buffers[key] = value.to(buffer.device, buffer.dtype)
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta and isinstance(vars(fresh).get(key), Tensor):
                device = next((b.device for b in module.buffers(recurse=False)), torch.device("cpu"))
                setattr(module, key, vars(fresh)[key].to(device))
