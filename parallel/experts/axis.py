"""This rank's place in its expert group."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from stoker.conf.schema import Config
from stoker.parallel.mesh import Mesh

DISPATCHERS = ALL_TO_ALL, ALL_GATHER = "alltoall", "allgather"


@dataclass(frozen=True)
class ExpertAxis:
    """Ranks that hold the experts together, equally many each. It exists only where there are at least two of them."""

    size: int
    rank: int
    group_name: str  # torch's, which functional collectives go by
    dispatcher: str  # one of DISPATCHERS
    rehearsed: bool = False  # tensors have no values: every rank is sent as many rows as any other


def expert_axis(config: Config, mesh: Mesh) -> ExpertAxis | None:
    """The expert group of `mesh`, None if its size is 1."""
    if mesh.layout.ep == 1:
        return None
    group = mesh.group("ep")
    assert group is not None
    return ExpertAxis(
        mesh.layout.ep,
        mesh.layout.ep_rank(mesh.rank),
        group.group_name,
        config.parallel.token_dispatcher,
        rehearsed=dist.get_backend(group) == "fake",
    )
