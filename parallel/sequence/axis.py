"""This rank's place on the cp axis."""

from __future__ import annotations

from dataclasses import dataclass

from stoker.conf.schema import Config
from stoker.parallel.mesh import Mesh

EXCHANGES = GATHER, ULYSSES = "gather", "ulysses"


@dataclass(frozen=True)
class SequenceAxis:
    """Ranks that share the tokens of each sequence. It exists only where there are at least two of them."""

    size: int
    rank: int
    group_name: str  # torch's, which functional collectives go by
    exchange: str  # one of EXCHANGES
    recomputed: bool  # whether layers are computed again in backward, so that what they gather lives for one layer only


def sequence_axis(config: Config, mesh: Mesh) -> SequenceAxis | None:
    """The cp axis of `mesh`, None if its size is 1."""
    group = mesh.group("cp")
    if group is None:
        return None
    recomputed = config.activation_checkpointing == "full"
    return SequenceAxis(
        mesh.layout.cp, mesh.coordinate.cp, group.group_name, config.parallel.context, recomputed=recomputed
    )
