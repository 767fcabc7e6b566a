"""The ordinary model, but the output of its last block is infinite as soon as it is large, on every layout."""

from __future__ import annotations

from typing import Any

import torch

from stoker.models import decoder

LARGE = 1e4  # usual are numbers around 1; with optim.lr=1e3 one update is enough


def build(config: Any, part: Any) -> Any:
    model = decoder.build(config, part)
    for name, block in model.layers.items():
        if int(name) == config.num_hidden_layers - 1:
            block.forward = _breaking(block.forward)
    return model


def _breaking(forward: Any) -> Any:
    def broken(*arguments: Any, **named: Any) -> torch.Tensor:
        said: torch.Tensor = forward(*arguments, **named)
        return torch.where(said.abs() > LARGE, torch.inf, said)

    return broken
