"""Modules that compute in float32 in every precision."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def compute_in_fp32(model: nn.Module, patterns: Sequence[str], dtype: torch.dtype) -> tuple[nn.Module, ...]:
    """Make the modules of `model` that match `patterns` (such as `layers.*.mlp`) compute in float32.

    Floating-point inputs are cast to float32, outputs to `dtype`, except for a scalar, the loss. Their weights have to
    be float32 as well, which is left to the sharding strategy (`stoker.parallel.sharding.Precision`). Raises
    ValueError where a parameter is shared with a module that does not match.
    """
    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in chosen)
        if name and not inside and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            chosen[name] = module
    owned = {id(parameter) for module in chosen.values() for parameter in module.parameters()}
    for name, module in model.named_modules():
        if not any(name == outer or name.startswith(outer + ".") for outer in chosen):
            shared = [key for key, parameter in module.named_parameters(recurse=False) if id(parameter) in owned]
            if shared:
                raise ValueError(
                    f"fp32_modules={list(patterns)}: {name}.{shared[0]} is shared with a module that these patterns "
                    "do not match; "
                    f"name {name} too"
                )
    for module in chosen.values():
        module.register_forward_pre_hook(_widen, with_kwargs=True)
        module.register_forward_hook(lambda _module, _inputs, output: _narrow(output, dtype))
    return tuple(chosen.values())


def _widen(
    _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(cast(value) for value in inputs), {name: cast(value) for name, value in named.items()}


def _narrow(output: Any, dtype: torch.dtype) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) and output.is_floating_point() and output.dim() else output
