"""The whole model of an adapter run's checkpoint, one tensor at a time: the base from its source, each compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from stoker.conf.schema import Config
from stoker.models.adapters import plan_of
from stoker.models.family import build_on_meta
from stoker.parallel.digest import digests
from stoker.parallel.initialize import initialize
from stoker.parallel.model import whole_model
from stoker.parallel.registry import whole_registry
from stoker.parallel.shards import PARAMETER, Shard, whole
from stoker.parallel.tensor.nf4 import rounded
from stoker.trainer.frozen_base import refuse_other_base
from stoker.trainer.pretrained import open_pretrained


@contextmanager
def open_base(config: Config, stored: Mapping[str, str]) -> Iterator[Callable[[str], Tensor]]:
    """A function from the name of a frozen parameter to its values, float32 on the CPU; of a packed one, unpacked.

    `stored` are the digests in the checkpoint's state. The function raises ValueError for a tensor that is not the one
    that the adapter was trained on. `config.model.vocab_size` is set.
    """
    whole_base = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    registry, plan = whole_registry(whole_base), plan_of(whole_base, config)
    packed = {f"{module}.weight" for module in plan.packed} if plan is not None else set()
    with ExitStack() as files:
        fill = files.enter_context(open_pretrained(config)) if config.model.init_from is not None else None

        def read(name: str) -> Tensor:
            shape = registry.entries[name].shape
            shard = Shard(name, PARAMETER, shape, whole(shape), torch.empty(shape))
            initialize([shard], registry.initial, config.run.seed)
            if fill is not None:
                fill([shard])
            here = {known: f"{digest:016x}" for known, digest in digests([shard]).items()}
            refuse_other_base(config.model.init_from, here, {name: stored.get(name, "")})
            return rounded(shard.data) if name in packed else shard.data

        yield read
