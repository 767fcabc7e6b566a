"""The packed weights of an adapter run's base (`adapter.base=nf4`), read and packed one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack

from torch import nn

from stoker.conf.schema import Config
from stoker.models.family import build_on_meta
from stoker.parallel.initialize import initialize
from stoker.parallel.model import whole_model
from stoker.parallel.registry import whole_registry
from stoker.parallel.shards import Shard
from stoker.parallel.tensor.nf4 import packed_in
from stoker.trainer.pretrained import open_pretrained


def fill_packed(config: Config, modules: Iterable[nn.Module]) -> Iterator[Shard]:
    """Fill all packed weights in `modules`; of each the part of this rank in float32, as it was read.

    `config.model.vocab_size` is set.
    """
    registry = whole_registry(build_on_meta(config.model, whole_model(config.model.num_hidden_layers)))
    with ExitStack() as files:
        fill = files.enter_context(open_pretrained(config)) if config.model.init_from is not None else None
        for packed in packed_in(modules):
            shard = packed.shard()
            initialize([shard], registry.initial, config.run.seed)
            if fill is not None:
                fill([shard])
            packed.fill(shard.data)
            yield shard
