"""Functions that compiled graphs leave out, without loading the compiler where nothing is compiled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor


def apart(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, left out of compiled graphs. To be called at each use: torch's decorator loads the compiler, which
    takes more than a second.
    """
    return _disabled(function) if "torch._dynamo" in sys.modules else function


@functools.cache
def _disabled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compiler.disable(function)
