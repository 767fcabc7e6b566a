"""The logits of a training step on any layout: taken at the head while its weight is gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from stoker.models.loss import Head
from stoker.parallel.tensor.regions import enter


class LogitsRecorder:
    """While entered, keeps the logits of the first `tokens` tokens of any head of this process.

    `parts` then holds this rank's share of the vocabulary: fp32 `[tokens, vocab]` on the CPU, by its first token id.
    """

    def __init__(self, tokens: int) -> None:
        self._left = tokens
        self._found: dict[int, list[Tensor]] = {}

    @property
    def parts(self) -> dict[int, Tensor]:
        return {start: torch.cat(found) for start, found in self._found.items()}

    def __enter__(self) -> LogitsRecorder:
        # A hook for all modules: it runs before the sharding strategy's hooks, which reshard the weight.
        self._hook = register_module_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _keep(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if not isinstance(module, Head) or module.weight.is_meta:
            return
        with torch.no_grad():
            x = arguments[0]
            if module.vocabulary is not None:
                x = enter(x, module.vocabulary.axis)  # a collective: all ranks call it, also without tokens left
            x = x[: self._left]
            self._left -= len(x)
            if len(x):
                start = 0 if module.vocabulary is None else module.vocabulary.share.start
                self._found.setdefault(start, []).append(module.logits(x).cpu())
