"""Functions that compiled graphs leave out, without loading the compiler where nothing is compiled.

`torch._dynamo` is 800 modules and more than a second of a processor, at the start of each rank. torch loads it to mark
functions that a graph shall not contain: hooks of `fully_shard`, steps of optimizers, constructors of DTensors. While
it is not loaded there are no graphs, and the functions can be called as they are. `wait_for_compiler` has torch's do
so, `apart` ours. Both look again at each call: a model or a user that compiles something loads the compiler, and from
then on everything is marked as torch marks it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

_COMPILER = "torch._dynamo"
_MARKED = "__dynamo_disable"  # of a function: where `torch._compile` keeps the marked one from its first call on


def apart(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, left out of compiled graphs. To be called at each use: torch's decorator loads the compiler."""
    return _disabled(function) if _COMPILER in sys.modules else function


@functools.cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)


def step_apart(step: Callable[..., Any]) -> Callable[..., Any]:
    """The `step` of a class of `torch.optim`, less the decorator that torch puts on it to break graphs.

    What else the decorator does is kept: gradients of the update are recorded only for `differentiable=True`.
    """
    plain = inspect.unwrap(step)

    @functools.wraps(plain)
    def eager(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, closure)

    return eager


def wait_for_compiler() -> None:
    """For the process of a rank: what torch calls at a start and in steps does not load the compiler by itself."""
    if _COMPILER not in sys.modules:
        torch._dynamo = _NotLoaded()  # type: ignore[assignment]  # the import system replaces it by the loaded one
        leave_unmarked(Optimizer.add_param_group, Optimizer.zero_grad, checkpoint)


def leave_unmarked(*decorated: Callable[..., Any]) -> None:
    """Functions that torch decorated with `_disable_dynamo`, after `wait_for_compiler` in this process."""
    if isinstance(vars(torch).get("_dynamo"), _NotLoaded):
        for function in (getattr(each, "__wrapped__", each) for each in decorated):
            setattr(function, _MARKED, _as_is_until_loaded(function))


class _NotLoaded:
    """The attribute `torch._dynamo` until that is loaded, which any other attribute than `disable` does."""

    @staticmethod
    def disable(fn: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Any:
        if fn is None or _COMPILER in sys.modules:
            return importlib.import_module(_COMPILER).disable(fn, *args, **options)
        return functools.wraps(fn)(_as_is_until_loaded(fn, *args, **options))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by `inspect` and the like
            raise AttributeError(name)
        return getattr(importlib.import_module(_COMPILER), name)


def _as_is_until_loaded(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    """`function`; once the compiler is loaded, marked for it with these arguments of its decorator."""
    marked: Callable[..., Any] | None = None

    def call(*given: Any, **named: Any) -> Any:
        nonlocal marked
        if _COMPILER not in sys.modules:
            return function(*given, **named)
        if marked is None:
            marked = sys.modules[_COMPILER].disable(function, *args, **options)
        return marked(*given, **named)

    return call
