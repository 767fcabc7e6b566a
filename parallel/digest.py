"""A digest of a tensor that no layout changes: a sum over its elements, which ranks compute of any parts of it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from stoker.parallel.shards import Chunk, Shard

_BLOCK_NUMEL = 1 << 20  # elements whose 64-bit terms exist at one time
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # of SplitMix64, as signed numbers


def digests(shards: Iterable[Shard], device: torch.device | None = None) -> dict[str, int]:
    """By name, this rank's part of the digests of the float32 tensors that `shards` are parts of.

    The sums over all ranks, modulo 2 ** 64, are the digests: each element, with its place in the whole tensor, gives a
    term that mixes all bits of both. Of replicas the first one counts. They are computed on `device`, or where the
    data are.
    """
    found: dict[str, int] = {}
    for shard in shards:
        part = _sum(shard, device or shard.data.device) if shard.replica == 0 and shard.data.numel() else 0
        found[shard.name] = (found.get(shard.name, 0) + part) % (1 << 64)
    return found


def _sum(shard: Shard, device: torch.device) -> int:
    assert shard.data.dtype == torch.float32, shard.name
    if not shard.chunk.sizes:
        return int(_terms(shard.data.detach().reshape(1).to(device), torch.zeros(1, dtype=torch.int64, device=device)))
    rows = max(1, _BLOCK_NUMEL // max(1, math.prod(shard.chunk.sizes[1:])))
    total = 0
    for start in range(0, shard.chunk.sizes[0], rows):
        values = shard.data.detach()[start : start + rows].to(device)
        offsets = (shard.chunk.offsets[0] + start, *shard.chunk.offsets[1:])
        places = _places(Chunk(offsets, tuple(values.shape)), tuple(shard.shape), values.device)
        total += int(_terms(values, places))
    return total


def _places(chunk: Chunk, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers of a chunk's elements in the flattened tensor of this `shape`: int64 of the chunk's sizes."""
    places = torch.zeros((), dtype=torch.int64, device=device)
    for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        along = torch.arange(offset, offset + size, device=device) * math.prod(shape[dim + 1 :])
        places = places.unsqueeze(-1) + along
    return places


def _terms(values: Tensor, places: Tensor) -> Tensor:
    """The sum of all terms, int64, modulo 2 ** 64: products and sums of torch's integers wrap around."""
    bits = values.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    mixed = (places << 32 | bits) + places * _ODD[0]
    mixed = (mixed ^ (mixed >> 30)) * _ODD[1]
    mixed = (mixed ^ (mixed >> 27)) * _ODD[2]
    return (mixed ^ (mixed >> 31)).sum()
