"""A permutation of 0 .. size-1 for each (seed, epoch), computed element by element: no list of indices exists."""

from __future__ import annotations

import hashlib
from math import isqrt

import numpy as np

_ROUNDS = 6


def permute(index: np.ndarray, size: int, seed: int, epoch: int, of: str = "rows") -> np.ndarray:
    """Where each of `index` (int64, each in `range(size)`) goes in the order of `epoch`; int64 of the same shape.

    `of` names the kind of things shuffled: each kind has a separate order.

    A Feistel network (Luby and Rackoff 1988) permutes the smallest square that holds `size`; an element outside of
    `size` is permuted again until it is inside (cycle walking, Black and Rogaway 2002), which keeps the map
    one-to-one. A square exceeds `size` by few elements, so second trips are rare.
    """
    side = np.uint64(isqrt(size - 1) + 1)
    keys: np.ndarray = np.frombuffer(
        hashlib.blake2b(f"{of} {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest(), "<u8"
    )
    found = _feistel(index.astype(np.uint64), side, keys)
    while (outside := found >= size).any():
        found[outside] = _feistel(found[outside], side, keys)
    return found.astype(np.int64)


def _feistel(value: np.ndarray, side: np.uint64, keys: np.ndarray) -> np.ndarray:
    left: np.ndarray = value // side
    right: np.ndarray = value % side
    for key in keys:
        left, right = right, (left + _mix(right + key) % side) % side
    return left * side + right


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), modulo 2**64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
