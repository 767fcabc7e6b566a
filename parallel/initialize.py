"""Initial weights: a function of (seed, global name, row block), so that every layout starts from the same ones.

They are the same to the last bit on every processor too (`stoker.parallel.normal`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from stoker.parallel.model import Constant, Normal
from stoker.parallel.normal import normal
from stoker.parallel.shards import PARAMETER, Chunk, Shard

BLOCK_NUMEL = 1 << 18  # elements per row block: small enough that a rank makes little it does not need


def initialize(shards: Iterable[Shard], rule: Callable[[str], Normal | Constant], seed: int) -> None:
    """Fill the parameters among `shards` in place. `rule` gives the initial distribution of a parameter by its name."""
    for shard in shards:
        if shard.kind == PARAMETER:
            with torch.no_grad():
                _fill(shard, rule(shard.name), seed)


def _fill(shard: Shard, rule: Normal | Constant, seed: int) -> None:
    if isinstance(rule, Constant):
        shard.data.fill_(rule.value)
        return
    wanted = shard.chunk
    if not wanted.offsets:
        shard.data.copy_(_block(shard, rule, seed, 0, ()))
        return
    rows = max(1, BLOCK_NUMEL // max(1, math.prod(shard.shape[1:])))
    for number in range(wanted.offsets[0] // rows, -(-(wanted.offsets[0] + wanted.sizes[0]) // rows)):
        start = number * rows
        size = (min(rows, shard.shape[0] - start), *shard.shape[1:])
        block = Chunk((start, *(0 for _ in shard.shape[1:])), size)
        part = block.intersection(wanted)
        if part is not None:
            made = _block(shard, rule, seed, number, size)
            shard.data[part.within(wanted)] = made[part.within(block)].to(shard.data)


def _block(shard: Shard, rule: Normal, seed: int, number: int, size: tuple[int, ...]) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{shard.name}/{number}".encode(), digest_size=16).digest()
    return normal(math.prod(size), key=int.from_bytes(digest, "little")).view(size).mul_(rule.std)
