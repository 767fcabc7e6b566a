"""Fits of messages, pairs of machines, and collectives on ranks."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from stoker.conf.schema import Config, ParallelConfig
from stoker.parallel.layout import layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.trainer.probe.links import KINDS, SIZES, axis_links, fit, machine_links, rounds
from tests import world


def test_a_line_is_found_through_points_of_eleven_sizes_of_noise() -> None:
    draw = random.Random(0)
    for latency, rate in itertools.product((1e-6, 1e-4, 1e-2), (1e7, 1e9, 4e11)):
        exact = [(float(size), latency + size / rate) for size in SIZES]
        line = fit(exact)
        assert (line.latency, line.rate) == (pytest.approx(latency, rel=1e-3), pytest.approx(rate, rel=1e-6))
        noisy = fit([(size, seconds * draw.uniform(1.0, 1.1)) for size, seconds in exact])
        assert noisy.latency == pytest.approx(latency, rel=0.5, abs=2 * SIZES[0] / rate)
        if SIZES[-1] / rate > latency:
            assert noisy.rate == pytest.approx(rate, rel=0.2)


def test_a_fit_never_has_a_negative_latency_or_rate() -> None:
    assert fit([(1.0, 1.0), (2.0, 3.0)]).latency == 0.0
    assert fit([(1.0, 3.0), (2.0, 1.0)]).rate == 2.0
    assert fit([(8.0, 2.0)]).rate == 4.0


@pytest.mark.parametrize("count", range(1, 10))
def test_every_two_machines_meet_once_and_none_is_in_two_pairs_of_a_round(count: int) -> None:
    met = []
    for pairs in rounds(range(count)):
        ends = [end for pair in pairs for end in pair]
        assert len(ends) == len(set(ends))
        met += [frozenset(pair) for pair in pairs]
    assert sorted(map(sorted, met)) == [list(pair) for pair in itertools.combinations(range(count), 2)]


def _measured(config: Config) -> tuple:
    ranks = torch.distributed.get_world_size()
    mesh = mesh_over_default_group(layout_of(config, ranks), torch.device("cpu"), 60.0)
    return axis_links(mesh, 1 << 18, 0.5), machine_links(mesh, range(0, ranks, 2), 1 << 20, 0.2)


def test_ranks_measure_every_axis_and_every_other_machine() -> None:
    config = Config(parallel=ParallelConfig(tp=2, zero=1))
    found = world.run(_measured, 4, config)
    for rank, (axes, links) in enumerate(found):
        assert [(link.axis, link.kind) for link in axes] == list(itertools.product(("dp_shard", "tp"), KINDS))
        assert all(rank in link.ranks and link.line.rate > 0 and link.largest for link in axes)
        assert [link.to for link in links] == {0: [2], 2: [0]}.get(rank, [])
    for axis in range(len(KINDS)):
        lines = {tuple(axes[axis].ranks): axes[axis].line for axes, _ in found}
        assert all(axes[axis].line == lines[tuple(axes[axis].ranks)] for axes, _ in found), "fits are the group's"
