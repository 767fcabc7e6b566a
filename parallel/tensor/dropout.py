"""Dropout as a function of the run: no layout, micro-batch or recomputation changes which numbers are dropped.

A token has a number in the run: that of its sequence times seq_len, plus its place in it. For each token of each layer
there is a SplitMix64 generator (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", with the
constants of its reference code), whose state is a hash of (seed, layer, token). Its n-th number is four times sixteen
bits, for channels 4n to 4n + 3: each is dropped where its bits are a number below the probability times 2^16. All
numbers of all tokens are computed at once, on the tokens and channels that a rank has, in 64-bit integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stoker.parallel.tensor.axis import TensorAxis

LEVELS = 1 << 16  # a probability is a multiple of 1 / LEVELS
_LANES = 4  # channels of a number of 64 bits
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class TokenNumbers:
    """Which tokens of the run a stage computes at this moment; its layers with dropout share it."""

    def __init__(self) -> None:
        self.current: Tensor | None = None  # int64 [rows, seq_len], of a micro-batch
        self.axis: TensorAxis | None = None  # where ranks share tokens outside of regions

    @contextmanager
    def of(self, numbers: Tensor | None) -> Iterator[None]:
        """Computing a micro-batch of these tokens."""
        before, self.current = self.current, numbers
        try:
            yield
        finally:
            self.current = before

    def rows_of(self, x: Tensor, layer: str) -> Tensor:
        """int64 `[tokens]`, the token of each row of `x`, `[tokens, channels]` or `[rows, seq_len, channels]`.

        Raises ValueError where they are not the micro-batch's, in its order.
        """
        if self.current is None:
            raise ValueError(f"{layer}: dropout needs `first_row`, which `forward_backward` was not given")
        numbers, shape = self.current, tuple(x.shape[:-1])
        if shape in (tuple(numbers.shape), (numbers.numel(),)):
            return numbers.flatten()
        if self.axis is not None and shape == (numbers.numel() // self.axis.size,):
            return numbers.flatten().chunk(self.axis.size)[self.axis.rank]
        raise ValueError(
            f"{layer} takes activations {list(x.shape)} of a micro-batch of {numbers.shape[0]} x {numbers.shape[1]} "
            "tokens: which they are is not known, so adapter.dropout cannot be the same on every layout: "
            "adapter.dropout=0 works, or adapter.target_modules without this layer"
        )


@dataclass
class Dropout:
    """Of what a layer of this name takes: `share` are the input channels of this rank."""

    probability: float
    seed: int
    layer: str
    tokens: TokenNumbers
    share: range

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(f"{self.seed}/{self.layer}/dropout".encode(), digest_size=8).digest()
        self._key = int.from_bytes(digest, "little", signed=True)
        self._threshold = round(self.probability * LEVELS)

    @property
    def scale(self) -> float:
        """The factor of what is kept."""
        return LEVELS / (LEVELS - self._threshold)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` `[..., channels]` with zeros where it is dropped; the rest as it is, for the caller to scale."""
        if x.is_meta:  # a trial, for shapes
            return x
        tokens, channels = self.tokens.rows_of(x, self.layer), self.share
        mask = dropped(tokens, self._key, channels.start, channels.stop, self._threshold)
        return x.masked_fill(mask.view(x.shape), 0.0)


@torch.library.custom_op("stoker::dropped", mutates_args=())  # so that torch.compile computes no other integers
def dropped(tokens: Tensor, key: int, start: int, stop: int, threshold: int) -> Tensor:
    """Which of the channels `start` to `stop` of `tokens` (int64 `[tokens]`) are dropped, of 2^16 `threshold`.

    bool `[tokens, stop - start]`; `key` is 64 bits, signed.
    """
    first, last = start // _LANES, -(-stop // _LANES)
    states = _mix(tokens * _signed(_GAMMA) + key)
    steps = torch.arange(first + 1, last + 1, device=tokens.device) * _signed(_GAMMA)
    lanes = _mix(states[:, None] + steps).view(torch.int16)  # little-endian: the lowest bits come first
    return lanes[:, start - first * _LANES : stop - first * _LANES] < threshold - LEVELS // 2


@dropped.register_fake
def _(tokens: Tensor, key: int, start: int, stop: int, threshold: int) -> Tensor:
    return tokens.new_empty((len(tokens), stop - start), dtype=torch.bool)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Stafford's variant 13 of MurmurHash3's), of int64 as 64 bits without a sign."""
    z = (z ^ _right(z, 30)) * _signed(_FIRST)
    z = (z ^ _right(z, 27)) * _signed(_SECOND)
    return z ^ _right(z, 31)


def _right(z: Tensor, bits: int) -> Tensor:
    """Shifted right, with zeros from the left."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def token_numbers(model: nn.Module) -> TokenNumbers | None:
    """The one that the layers of a stage share; None where none has dropout."""
    found = (getattr(module, "dropout", None) for module in model.modules())
    return next((dropout.tokens for dropout in found if isinstance(dropout, Dropout)), None)
