"""The first lengths of the rows of weights with `adapter=dora`: those of the base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from stoker.conf.schema import Config
from stoker.models.family import build_on_meta
from stoker.parallel.initialize import initialize
from stoker.parallel.model import whole_model
from stoker.parallel.registry import whole_registry
from stoker.parallel.shards import PARAMETER, Chunk, Shard
from stoker.parallel.tensor.low_rank import MAGNITUDE
from stoker.trainer.pretrained import open_pretrained


def set_magnitudes(config: Config, shards: Sequence[Shard]) -> None:
    """Fill the lengths among `shards`. A rank reads its rows whole, whatever part of them it trains with, so that no
    layout changes a length. `config.model.vocab_size` is set.
    """
    registry = whole_registry(build_on_meta(config.model, whole_model(config.model.num_hidden_layers)))
    with ExitStack() as files, torch.no_grad():
        fill = files.enter_context(open_pretrained(config)) if config.model.init_from is not None else None
        for shard in shards:
            if shard.kind != PARAMETER or not shard.name.endswith(f".{MAGNITUDE}") or not shard.data.numel():
                continue
            name = f"{shard.name.removesuffix(MAGNITUDE)}weight"
            shape = registry.entries[name].shape
            rows = Chunk((shard.chunk.offsets[0], 0), (shard.chunk.sizes[0], shape[1]))
            base = Shard(name, PARAMETER, shape, rows, torch.empty(rows.sizes))
            initialize([base], registry.initial, config.run.seed)
            if fill is not None:
                fill([base])
            lengths = torch.linalg.vector_norm(base.data, dim=1, dtype=torch.float64)
            shard.data.detach().copy_(lengths.to(shard.data.dtype))
