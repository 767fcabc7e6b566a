from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from stoker.conf.schema import Config
from stoker.parallel.layout import AXES, Coordinate, Layout, View, batch_plan, fit, layout_of, threads_per_rank

SIZE = st.integers(1, 5)
LAYOUTS = st.builds(Layout, SIZE, SIZE, SIZE, SIZE)
AXIS_SETS = st.sets(st.sampled_from(AXES)).map(tuple)
MOST_RANKS = 16384


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any sizes whose product is at most MOST_RANKS. Drawn in any order: each axis is the long one now and then."""
    sizes = dict.fromkeys(AXES, 1)
    left = MOST_RANKS
    for axis in draw(st.permutations(AXES)):
        sizes[axis] = draw(st.integers(1, min(left, 12)) | st.integers(1, left))
        left //= sizes[axis]
    return Layout(**sizes)


UP_TO_MOST_RANKS = settings(max_examples=30, deadline=None)
LARGEST = example(Layout(dp_replicate=8, dp_shard=64, tp=8, pp=4))


def grid(layout: Layout) -> np.ndarray:
    """The ranks in the order of AXES, by numpy only: `[pp, dp_replicate, dp_shard, cp, tp]`."""
    return np.arange(layout.world).reshape(layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)


@UP_TO_MOST_RANKS
@LARGEST
@given(layouts())
def test_a_coordinate_is_the_inverse_of_a_rank(layout):
    places = [layout.coordinate(rank) for rank in range(layout.world)]
    assert [layout.rank(at) for at in places] == list(range(layout.world))
    by_axis = np.array([[getattr(at, axis) for axis in AXES] for at in places])
    assert np.array_equal(by_axis, np.argwhere(grid(layout) >= 0))


@UP_TO_MOST_RANKS
@LARGEST
@given(layouts())
def test_tensor_parallel_ranks_are_adjacent_and_stages_are_far_apart(layout):
    tp, pp = np.array(layout.groups("tp")), np.array(layout.groups("pp"))
    assert (np.diff(tp) == 1).all() and (tp[:, 0] % layout.tp == 0).all()
    assert (np.diff(pp) == layout.world // layout.pp).all()
    strides = [layout.stride(axis) for axis in ("tp", "cp", "dp_shard", "dp_replicate", "pp")]
    model = layout.tp * layout.cp
    assert strides == [1, layout.tp, model, model * layout.dp_shard, model * layout.dp]


@UP_TO_MOST_RANKS
@example(Layout(dp_replicate=8, dp_shard=64, tp=8, pp=4), ("dp_shard", "pp"))
@given(layouts(), AXIS_SETS)
def test_groups_partition_the_ranks_and_differ_only_along_their_axes(layout, axes):
    groups = np.array(layout.groups(*axes))
    size = math.prod(getattr(layout, axis) for axis in axes)
    assert groups.shape == (layout.world // size, size)
    assert np.array_equal(np.sort(groups, axis=None), np.arange(layout.world))
    along = [number for number, axis in enumerate(AXES) if axis in axes]
    across = [number for number, axis in enumerate(AXES) if axis not in axes]
    assert np.array_equal(groups, grid(layout).transpose(across + along).reshape(groups.shape))


@UP_TO_MOST_RANKS
@LARGEST
@given(layouts())
def test_every_set_of_rows_is_read_by_one_replica_of_tp_cp_and_pp_ranks(layout):
    dp_rank = np.array([layout.dp_rank(rank) for rank in range(layout.world)])
    assert np.array_equal(np.bincount(dp_rank), np.full(layout.dp, layout.tp * layout.cp * layout.pp))
    replicas = np.argsort(dp_rank, kind="stable").reshape(layout.dp, -1)  # the ranks of each set of rows, in order
    assert np.array_equal(replicas, np.array(layout.groups("tp", "cp", "pp")))
    parts = list(itertools.product(range(layout.pp), range(layout.cp), range(layout.tp)))
    for ranks in replicas[[0, -1]].tolist():
        assert [(at.pp, at.cp, at.tp) for at in map(layout.coordinate, ranks)] == parts


def test_rank_order_is_the_documented_one():
    layout = Layout(dp_replicate=2, dp_shard=2, tp=2, pp=2)
    assert layout.coordinate(11) == Coordinate(pp=1, dp_replicate=0, dp_shard=1, cp=0, tp=1)
    assert layout.groups("tp")[0] == [0, 1]
    assert layout.groups("dp_shard")[0] == [0, 2]
    assert layout.groups("dp_replicate")[0] == [0, 4]
    assert layout.groups("pp")[0] == [0, 8]


def test_16384_ranks_are_grouped_without_a_noticeable_wait():
    layout = Layout(dp_replicate=8, dp_shard=64, tp=8, pp=4)
    start = time.process_time()
    for axis in AXES:
        layout.groups(axis)
    assert time.process_time() - start < 0.5


def asked(**parallel: object) -> Config:
    config = Config()
    for key, value in parallel.items():
        setattr(config.parallel, key, value)
    return config


@given(SIZE, SIZE, SIZE, SIZE, st.integers(1, 3))
def test_the_configured_layout_has_as_many_ranks_as_there_are(replicas, shards, tp, pp, zero):
    world = replicas * shards * tp * pp
    layout = layout_of(asked(tp=tp, pp=pp, zero=zero, dp_replicate=replicas), world)
    assert layout == Layout(replicas, shards, tp, pp, zero, "fsdp") and layout.world == world


@given(SIZE, SIZE)
def test_zero_0_replicates_and_the_others_shard_over_all_by_default(dp, tp):
    assert layout_of(asked(tp=tp, zero=0), dp * tp) == Layout(dp, 1, tp, 1, 0)
    assert layout_of(asked(tp=tp, zero=0, dp_replicate=dp), dp * tp) == Layout(dp, 1, tp, 1, 0)
    assert layout_of(asked(tp=tp, zero=3), dp * tp) == Layout(1, dp, tp, 1, 3)


@pytest.mark.parametrize(
    ("parallel", "world", "words"),
    [
        ({"tp": 3}, 4, "4 ranks do not divide into tp 3 x pp 1"),
        ({"tp": 2, "pp": 2}, 2, "2 ranks do not divide into tp 2 x pp 2"),
        ({"zero": 0, "dp_replicate": 2}, 4, "ZeRO 0 keeps a replica on each of the 4"),
        ({"zero": 1, "dp_replicate": 3}, 4, "4 data-parallel ranks do not divide into 3 replicas"),
    ],
)
def test_axes_that_do_not_fit_the_ranks_raise(parallel, world, words):
    with pytest.raises(ValueError, match=words):
        layout_of(asked(**parallel), world)


@given(LAYOUTS, st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_a_plan_covers_the_global_batch_exactly(layout, rank_rows, micro, given_micro):
    config = Config()
    config.batch.size = layout.dp * rank_rows
    if given_micro:
        assume(rank_rows % micro == 0)
        config.batch.micro_size = micro
    plan = batch_plan(config, layout)
    assert plan.rank_rows == rank_rows
    assert layout.dp * plan.micro_batches * plan.micro_rows == plan.rows == config.batch.size
    assert plan.micro_rows == micro if given_micro else plan.micro_rows <= 8


def test_the_default_micro_batch_is_the_largest_divisor_up_to_eight():
    expected = {1: 1, 7: 7, 8: 8, 9: 3, 11: 1, 12: 6, 32: 8}
    for rows, micro in expected.items():
        config = Config()
        config.batch.size = rows
        assert batch_plan(config, Layout()).micro_rows == micro


@given(LAYOUTS, st.integers(0, 60), st.integers(1, 20))
def test_rows_that_do_not_divide_raise(layout, rows, micro):
    config = Config()
    config.batch.size, config.batch.micro_size = rows, micro
    assume(rows == 0 or rows % layout.dp or rows // layout.dp % micro)
    with pytest.raises(ValueError, match="divide"):
        batch_plan(config, layout)


def test_a_layout_prints_what_is_more_than_one():
    assert str(Layout(dp_shard=4, tp=2, zero=3)) == "dp_shard 4 x tp 2, ZeRO 3, fsdp"
    assert str(Layout()) == "1 rank, ZeRO 0, fsdp"


def test_ranks_share_the_cores_they_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [threads_per_rank(None, ranks) for ranks in (1, 3, 8, 16)] == [8, 2, 1, 1]
    assert threads_per_rank(5, 16) == 5


@pytest.mark.parametrize(
    ("cp", "world", "rows", "fitted"),
    [
        (4, 4, 32, 4),
        (4, 1, 32, 1),  # as a replay or a smaller machine
        (4, 2, 32, 2),
        (4, 8, 32, 4),
        (4, 8, 1, 8),  # more ranks than rows for them
        (4, 6, 32, 4),  # refused: 6 is no multiple of 4, and 3 ranks do not divide the rows
        (1, 4, 2, 1),  # refused: a run without it gets none
    ],
)
def test_context_parallelism_fits_another_number_of_ranks(cp, world, rows, fitted):
    config = asked(cp=cp)
    config.batch.size = rows
    assert fit(config, world).parallel.cp == fitted


def test_context_parallelism_and_micro_batches_fit_steps_of_every_size():
    config = asked(cp=2)
    config.batch.size, config.batch.micro_size, config.batch.ramp = 32, 4, [[4, 1e6]]
    found = [fit(config, world) for world in (2, 4, 8, 16)]
    assert [(one.parallel.cp, one.batch.micro_size) for one in found] == [(2, 4), (2, 2), (2, 1), (4, 1)]
    for world, one in zip((2, 4, 8, 16), found, strict=True):
        assert batch_plan(one, layout_of(one, world)).micro_rows == one.batch.micro_size


def test_ranks_that_share_sequences_read_the_same_rows_and_share_what_zero_shards():
    layout = Layout(dp_replicate=2, dp_shard=2, cp=2, tp=2, zero=3)
    assert (layout.world, layout.dp, layout.shards, layout.replicas) == (16, 4, 4, 2)
    assert [layout.dp_rank(rank) for rank in range(16)] == [rank // 4 for rank in range(16)]
    assert layout.groups("cp")[:2] == [[0, 2], [1, 3]]
    assert layout.groups(*layout.sharding)[0] == [0, 2, 4, 6]
    assert layout.groups(*layout.replication)[0] == [0, 8]
    whole = dataclasses.replace(layout, dp_shard=1, zero=0)
    assert (whole.shards, whole.replicas) == (1, 4) and whole.groups(*whole.replication)[0] == [0, 2, 4, 6]


@given(SIZE, SIZE, SIZE, st.integers(1, 2), st.sampled_from([0, 1]), st.data())
def test_expert_groups_hold_every_expert_once_and_their_parts_are_sharded_like_the_rest(
    replicas, shards, cp, tp, zero, data
):
    whole = Layout(replicas if zero else replicas * shards, shards if zero else 1, tp, zero=zero, cp=cp)
    ep = data.draw(st.sampled_from([n for n in range(1, whole.most_ep + 1) if whole.most_ep % n == 0]))
    layout = dataclasses.replace(whole, ep=ep)
    ranks, tokens = range(layout.world), [r for r in range(layout.world) if layout.coordinate(r).tp == 0]
    groups = layout.expert_groups()
    assert sorted(rank for group in groups for rank in group) == list(ranks)
    for group in groups:
        assert [layout.ep_rank(rank) for rank in group] == list(range(ep))
        assert len({layout.coordinate(rank).tp for rank in group}) == 1
    alike = layout.expert_shard_groups() or [[rank] for rank in ranks]
    for group in alike:
        places = [layout.position(rank, View.EXPERTS) for rank in group]
        assert [place.shard for place in places] == list(range(places[0].shards))
        assert len({(layout.ep_rank(rank), layout.coordinate(rank).tp) for rank in group}) == 1
    for group in layout.expert_replica_groups():
        places = [layout.position(rank, View.EXPERTS) for rank in group]
        assert [place.replica for place in places] == list(range(places[0].replicas))
        assert len({(layout.ep_rank(rank), place.shard) for rank, place in zip(group, places, strict=True)}) == 1
    found = [(layout.ep_rank(rank), layout.position(rank, View.EXPERTS)) for rank in tokens]
    assert len(set(found)) == len(tokens), "each rank of a stage has its own place"
    place = found[0][1]
    assert ep * place.shards * place.replicas == len(tokens)


def test_expert_parallelism_fits_another_number_of_ranks():
    for ep, zero, world, fitted in ((4, 1, 8, 4), (4, 1, 2, 2), (4, 1, 6, 2), (4, 3, 1, 1), (4, 0, 4, 4), (6, 0, 4, 2)):
        config = asked(ep=ep, zero=zero)
        config.batch.size = 24
        assert fit(config, world).parallel.ep == fitted
        layout_of(fit(config, world), world)
    with pytest.raises(ValueError, match="ep 3 does not divide the 4 ranks"):
        layout_of(asked(ep=3), 4)
    assert str(layout_of(asked(ep=2), 4)) == "dp_shard 4, ep 2, ZeRO 1, fsdp"
