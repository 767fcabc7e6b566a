"""Seconds that this rank's GPU computes, without the time in which it waits for the collectives of others.

Ranks wait for each other in every step, so by the clock all GPUs are as slow as the slowest. What differs is how long
a GPU takes for the same work: events around the forward of each block show it, as parameters are gathered before a
block and gradients reduced after it. (Tensor-parallel ranks wait for each other within a block, and are all as slow as
the slowest of them.) Events are read once they have passed, which is a step or two later: nothing waits for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class GpuClock:
    """Times blocks on CUDA; on other devices it does nothing and reads 0."""

    def __init__(self, device: torch.device) -> None:
        self._on = device.type == "cuda"
        self._open: list[_Span] = []  # of the present step
        self._steps: deque[list[_Span]] = deque()  # that are over for the host, but not yet for the GPU
        self._free: list[_Span] = []

    def time(self, block: nn.Module) -> None:
        """Time every forward of `block` in training from now on: what hooks do before and after it is left out."""
        if self._on:
            block.forward = self._timed(block.forward)

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*arguments, **options)
            span = self._free.pop() if self._free else _Span()
            span.begin.record()
            result = forward(*arguments, **options)
            span.end.record()
            self._open.append(span)
            return result

        return timed

    def take(self) -> float:
        """Once a step: seconds of the newest step that the GPU has finished since the last call; 0 without one."""
        self._steps.append(self._open)
        self._open, seconds = [], 0.0
        while self._steps and all(span.end.query() for span in self._steps[0]):
            spans = self._steps.popleft()
            seconds = sum(span.begin.elapsed_time(span.end) for span in spans) / 1000
            self._free += spans
        return seconds


class _Span:
    """Between two events."""

    def __init__(self) -> None:
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
