"""Seconds that this rank's GPU computes, without the time in which it waits for the collectives of others.

Ranks wait for each other in every step, so by the clock all GPUs are as slow as the slowest. What differs is how long
a GPU takes for the same work: events around the forward of each block show it, as parameters are gathered before a
block and gradients reduced after it. (Tensor-parallel ranks wait for each other within a block, and are all as slow as
the slowest of them.) Events are read a step later, when they have long passed: nothing waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class GpuClock:
    """Times blocks on CUDA; on other devices it does nothing and reads 0."""

    def __init__(self, device: torch.device) -> None:
        self._on = device.type == "cuda"
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # of the present step
        self._passed: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # of the step before
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, block: nn.Module) -> None:
        """Time every forward of `block` in training from now on: what hooks do before and after it is left out."""
        if self._on:
            block.forward = self._timed(block.forward)

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*arguments, **options)
            begin, end = self._free.pop() if self._free else self._new()
            begin.record()
            result = forward(*arguments, **options)
            end.record()
            self._open.append((begin, end))
            return result

        return timed

    def take(self) -> float:
        """Seconds of the step before the one that ends now; 0 if they have not all passed yet."""
        done = all(end.query() for _, end in self._passed)
        seconds = sum(begin.elapsed_time(end) for begin, end in self._passed) / 1000 if done else 0.0
        self._free += self._passed if done else []
        self._passed, self._open = self._open, []
        return seconds

    @staticmethod
    def _new() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
