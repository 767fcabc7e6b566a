"""How many documents a row of a step has, and how long they are: numbers that kernels need on the host.

The host has the rows before the device does, so that it counts here, and no step waits for the device to count them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

LEAST = 8, 128  # of both numbers: fewer differ in no kernel


@dataclass(frozen=True)
class DocumentBounds:
    """Of all rows of a step: powers of two, or the length of a row, so that compiled blocks see few of them."""

    most: int  # documents of a row, at most
    longest: int  # tokens of a document, at most


class DocumentLayer(nn.Module):
    """A layer that makes use of bounds, where they are known."""

    bounds: DocumentBounds | None = None


def document_layers(model: nn.Module) -> list[DocumentLayer]:
    return [module for module in model.modules() if isinstance(module, DocumentLayer)]


@contextmanager
def bounded(layers: Sequence[DocumentLayer], documents: Tensor, device: torch.device) -> Iterator[None]:
    """Computing rows of these `documents` (int32 `[rows, tokens]`), no others, on `device`.

    Nothing is known of them on other devices than GPUs, which need no bounds, nor where they are on a GPU already.
    """
    known = layers and device.type == "cuda" and documents.device.type == "cpu" and len(documents)
    bounds = bounds_of(documents) if known else None
    for layer in layers:
        layer.bounds = bounds
    try:
        yield
    finally:
        for layer in layers:
            layer.bounds = None


def bounds_of(documents: Tensor) -> DocumentBounds | None:
    """Of `documents` on the host; None unless the tokens of each lie together, as rising numbers show."""
    numbers = documents.numpy()
    rows, length = numbers.shape
    steps = np.diff(numbers, axis=1)
    if (steps < 0).any():
        return None
    begins = np.ones((rows, length), np.bool_)
    begins[:, 1:] = steps != 0
    most = int(begins.sum(1).max())
    longest = int(np.diff(np.append(np.flatnonzero(begins), rows * length)).max())
    most, longest = (min(_power_above(max(n, least)), length) for n, least in zip((most, longest), LEAST, strict=True))
    return DocumentBounds(most, longest)


def _power_above(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
