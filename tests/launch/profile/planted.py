"""What slows runs of the tests down: rows that come late, a layer that takes its time, a save that does."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from stoker.data.loader import IndexedLoader
from stoker.models import decoder
from stoker.parallel.batch import Batch
from stoker.trainer.report.observer import Observer


def late(config: Any, part: Any) -> Any:
    """As `model.target`: the decoder, beside a loader whose rows come late. In a rank's own process."""
    following = IndexedLoader.next

    def slow(loader: IndexedLoader) -> Batch:
        time.sleep(0.5)
        return following(loader)

    IndexedLoader.next = slow  # type: ignore[method-assign]
    return decoder.build(config, part)


def build(config: Any, part: Any) -> Any:
    """As `model.target`: the decoder, with an MLP in the last layer that sleeps."""
    model = decoder.build(config, part)
    number = str(config.num_hidden_layers - 1)
    if number in model.layers:
        mlp = model.layers[number].mlp
        forward = mlp.forward

        def slow(x: Tensor) -> Tensor:
            time.sleep(0.1)
            return forward(x)

        mlp.forward = slow
    return model


class Slow(Observer):
    """Its part of a checkpoint takes a while to make."""

    def state(self) -> Any:
        time.sleep(0.5)
        return {}
