from __future__ import annotations

import torch
import torch.distributed as dist

from stoker.parallel.layout import Layout
from stoker.parallel.mesh import mesh_over_default_group
from tests import world

TEXTS = ["", "a name with a surrogate \udcff, \N{SNOWMAN} and \0", "x" * 100_000]


def exchanged() -> list[list[str]]:
    """What the ranks of a mesh gather when each gives another of the texts, with a pickle of which no byte is read."""
    mesh = mesh_over_default_group(Layout(dist.get_world_size()), torch.device("cpu"), 60.0)
    unpickler = dist.distributed_c10d._unpickler

    def refuse(*_: object) -> None:
        raise AssertionError("something is unpickled")

    dist.distributed_c10d._unpickler = refuse
    try:
        return [mesh.all_gather_text(TEXTS[(mesh.rank + shift) % len(TEXTS)]) for shift in range(3)]
    finally:
        dist.distributed_c10d._unpickler = unpickler


def test_texts_of_all_lengths_are_gathered_as_bytes() -> None:
    expected = [[TEXTS[(rank + shift) % 3] for rank in range(2)] for shift in range(3)]
    assert world.run(exchanged, 2) == [expected, expected]
