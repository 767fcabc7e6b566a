"""The frozen base of an adapter run: its checkpoints hold what is trained, and digests of what is not.

Every start reads the base where the first one did (`model.init_from`, or the initial weights of the seed), and compares
its digests with those of the checkpoint: an adapter means nothing beside other weights. Digests are of what was read,
in float32, whatever is held of it: neither `precision` nor `adapter.base` changes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import torch

from stoker.conf.schema import Config
from stoker.parallel.digest import digests
from stoker.parallel.mesh import Mesh
from stoker.parallel.model import whole_model
from stoker.parallel.shards import PARAMETER, Shard
from stoker.trainer.parallelize import part_builder

STATE = "base"  # the key of the digests in a checkpoint's state: {parameter: sixteen hexadecimal digits}


def frozen_names(config: Config) -> list[str]:
    """The parameters that an adapter run does not train, in the model's order; none where checkpoints hold all.

    `config.model.vocab_size` is set.
    """
    if config.adapter.name == "none":
        return []
    whole = part_builder(config)(whole_model(config.model.num_hidden_layers))
    return [name for name, parameter in whole.named_parameters() if not parameter.requires_grad]


class FrozenBase:
    """The parameters of these `names` on this rank, which checkpoints leave out."""

    def __init__(self, names: Sequence[str], source: str | None) -> None:
        self._names, self.known = list(names), frozenset(names)
        self._source = source  # `model.init_from`
        self.digests: dict[str, str] = {}

    def saved(self, shards: Iterable[Shard]) -> list[Shard]:
        """Those of `shards` that a checkpoint holds."""
        return [shard for shard in shards if not self._holds(shard)]

    def narrow(self, shards: Iterable[Shard]) -> list[Shard]:
        """Those of the base's `shards` that hold fewer bits than were read, which digests are of."""
        return [shard for shard in shards if self._holds(shard) and shard.data.dtype != torch.float32]

    def measure(self, shards: Iterable[Shard], mesh: Mesh) -> None:
        """Compute the digests of the base from its `shards` in float32. A collective."""
        own = digests((shard for shard in shards if self._holds(shard)), mesh.device)
        ranks = [json.loads(text) for text in mesh.all_gather_text(json.dumps(own))]
        self.digests = {name: f"{sum(rank.get(name, 0) for rank in ranks) % (1 << 64):016x}" for name in self._names}

    def refuse_other(self, stored: Mapping[str, str]) -> None:
        """Raises ValueError, naming the first tensor that differs from the base that a checkpoint's digests are of."""
        refuse_other_base(self._source, self.digests, stored)

    def _holds(self, shard: Shard) -> bool:
        return shard.kind == PARAMETER and shard.name in self.known


def refuse_other_base(source: str | None, here: Mapping[str, str], stored: Mapping[str, str]) -> None:
    """Raises ValueError where the digests of a base `here` are not those that a checkpoint has `stored`."""
    differing = [name for name, digest in here.items() if stored.get(name) != digest]
    differing += [name for name in stored if name not in here]
    if not differing:
        return
    more = f" (and {len(differing) - 1} more of {len(here)} tensors)" if len(differing) > 1 else ""
    base = "the initial weights of the seed" if source is None else f"the model in model.init_from={source}"
    back = "put back the version of Stoker" if source is None else "put back the files"
    raise ValueError(
        f"{base}: this is not the base that the adapter was trained on: {differing[0]} differs{more}; {back} of the "
        "first start"
    )
