"""What a rank holds of an adapter run's base in fewer bits than float32: read in float32, and rounded or packed once.

These are frozen weights in the compute dtype, and packed ones (`adapter.base=nf4`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from stoker.conf.schema import Config
from stoker.models.family import build_on_meta
from stoker.parallel.initialize import initialize
from stoker.parallel.model import whole_model
from stoker.parallel.registry import whole_registry
from stoker.parallel.shards import Shard
from stoker.parallel.tensor.nf4 import packed_in
from stoker.trainer.pretrained import open_pretrained

_READ_NUMEL = 1 << 26  # elements that are in float32 at a time, or those of one larger tensor


def fill_narrow(config: Config, held: Sequence[Shard], modules: Iterable[nn.Module]) -> Iterator[Shard]:
    """Fill `held`, frozen shards, and all packed weights in `modules`; of each the part of this rank in float32 on the
    CPU, as it was read. `config.model.vocab_size` is set.
    """
    registry = whole_registry(build_on_meta(config.model, whole_model(config.model.num_hidden_layers)))
    with ExitStack() as files:
        read = files.enter_context(open_pretrained(config)) if config.model.init_from is not None else None

        def fill(shards: Sequence[Shard]) -> None:
            if read is None or config.model.init_only:  # else the files hold all of them
                initialize(shards, registry.initial, config.run.seed)
            if read is not None:
                read(shards)

        for group in _groups(held):
            wide = [replace(shard, data=torch.empty(shard.chunk.sizes)) for shard in group]
            fill(wide)
            for shard, values in zip(group, wide, strict=True):
                shard.data.detach().copy_(values.data)
            yield from wide
        for packed in packed_in(modules):
            shard = packed.shard()
            fill([shard])
            packed.fill(shard.data)
            yield shard


def _groups(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    """Runs of `shards` of at most so many elements together."""
    group: list[Shard] = []
    for shard in shards:
        if group and sum(other.chunk.numel for other in group) + shard.chunk.numel > _READ_NUMEL:
            yield group
            group = []
        group.append(shard)
    if group:
        yield group
