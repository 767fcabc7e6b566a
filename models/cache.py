"""Keys and values of the tokens that a model has already seen, for generating one token at a time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor


class LayerCache:
    """One layer's keys and values, `[rows, capacity, kv_heads, head_dim]` each, allocated at first use."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0  # tokens
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of new tokens `[rows, new, kv_heads, head_dim]`; returns all so far, as views."""
        start, self.length = self.length, self.length + k.shape[1]
        assert self.length <= self.capacity
        if self._keys is None or self._values is None:
            shape = (k.shape[0], self.capacity, *k.shape[2:])
            self._keys, self._values = k.new_empty(shape), v.new_empty(shape)
        self._keys[:, start : self.length] = k
        self._values[:, start : self.length] = v
        return self._keys[:, : self.length], self._values[:, : self.length]


class Cache:
    """The caches of all layers, by global number, for at most `capacity` tokens per row."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0  # tokens that every layer has seen
        self.layers: defaultdict[str, LayerCache] = defaultdict(lambda: LayerCache(capacity))
        self.own: Any = None  # a cache of another kind, of a model that brings its own
