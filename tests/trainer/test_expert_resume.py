"""Experts that ranks share continue on any other layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.checkpoint import verify
from stoker.conf.schema import Config
from stoker.parallel.layout import Layout
from tests import world
from tests.extent import some
from tests.parallel.experts.test_parity import Sparse
from tests.parallel.parity import Case
from tests.parallel.reference import assemble, normwise, one_process
from tests.trainer.test_resume import HALF, half

HEIRS = [
    Layout(),
    Layout(1, 2, zero=2, ep=2),
    Layout(tp=2),
    Layout(2, 2, zero=1, ep=2),
    Layout(4, ep=4),
    Layout(1, 2, 1, 2, 3, ep=2),
]


def config_of(layout: Layout) -> Config:
    return Sparse(Case(4), expert_tp=layout.tp > 1).config(layout)


@pytest.mark.long
def test_a_run_with_experts_on_four_ranks_continues_with_fewer_and_comes_back(tmp_path: Path) -> None:
    first = Layout(1, 4, zero=3, ep=4)
    wanted = one_process(config_of(Layout()), 2 * HALF)
    world.run(half, 4, config_of(first), tmp_path / "first")
    for number, heir in enumerate(some(HEIRS, 2)):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "step-00000005").symlink_to(tmp_path / "first" / "step-00000005")
        results = world.run(half, heir.world, config_of(heir), directory)
        losses, norms = zip(*results[0][0], strict=True)
        assert losses == pytest.approx(wanted.losses[HALF:], rel=1e-5), heir
        assert norms == pytest.approx(wanted.norms[HALF:], rel=1e-5), heir
        for name, value in assemble([shards for _, shards in results]).items():
            assert normwise(value, wanted.parameters[name]) < 1e-4, f"{heir}: {name}"
    lost = tmp_path / "first" / "step-00000005" / "rank-00001.safetensors"
    lost.unlink()
    assert verify(tmp_path / "first" / "step-00000005"), "experts of a rank are missing"
