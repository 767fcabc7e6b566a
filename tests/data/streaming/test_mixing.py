"""Several sources in streams: rows in the proportions of the weights, on every layout."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.data.mixed import Weights
from stoker.data.mixture import whole_weights
from stoker.data.streaming.mixing import StreamMixture
from stoker.parallel.batch import IGNORE_INDEX
from tests.data.streaming.conftest import open_stream, write_lines
from tests.data.streaming.simulated import World, batches, digests

WEIGHTS = {"a": 5, "b": 3, "c": 0.5}


@pytest.fixture
def mixed(config, tmp_path):
    """Three endless sources of documents of one letter each."""
    for name in WEIGHTS:
        write_lines(tmp_path / name, [name * (n % 90 + 1) for n in range(200)])
    kinds = {"kind": "text", "validation": 0.0}
    config.data.sources = {n: {**kinds, "path": str(tmp_path / n), "weight": w} for n, w in WEIGHTS.items()}
    config.data.path, config.data.splits, config.data.epochs = None, None, None
    return config


def sources_of(rows) -> Counter:
    found = Counter()
    for row in rows.tokens.tolist():
        letters = {chr(token) for token in row if 0 < token < 256}
        assert len(letters) == 1  # a row is of one source
        found[letters.pop()] += 1
    return found


def test_every_batch_is_within_three_rows_of_the_weights_on_every_layout(mixed):
    opener = partial(open_stream, mixed)
    found = batches(opener, 40)
    whole = sum(WEIGHTS.values())
    for rows in found:
        counts = sources_of(rows)
        assert all(abs(counts[name] - 24 * weight / whole) <= 3 for name, weight in WEIGHTS.items())
    total = sum(map(sources_of, found), Counter())
    assert all(abs(total[name] - 960 * weight / whole) <= 3 for name, weight in WEIGHTS.items())
    splits = [{"dp": 4, "batches": 7}, {"dp": 3, "workers": 2, "batches": 4}, {"dp": 2, "peers": 2}]
    assert digests(batches(opener, 40, splits)) == digests(found)


def test_other_weights_hold_from_the_row_at_which_the_run_resumes(mixed):
    opener = partial(open_stream, mixed)
    with World(opener, dp=2) as world:
        before = world.batches(7)
        state = world.state()
    mixed.data.weights = {"a": 0, "b": 1, "c": 9}
    with World(opener, dp=3) as world:
        world.load(state)
        after = world.batches(8)
        later = world.state()
        rest = digests(world.batches(5))
    counts = sum(map(sources_of, after), Counter())
    assert counts["a"] == 0 and abs(counts["c"] - 8 * 24 * 0.9) <= 3
    with World(opener, dp=4, workers=1) as world:
        world.load(later)
        assert world.state() == later
        assert digests(world.batches(5)) == rest
    letters = Counter()
    for rows in before + after:  # each source has its own order: b continues where it was
        for row in rows.tokens.tolist():
            letters[tuple(row)] += 1
    mixed.data.weights = {}
    alone = digests(batches(opener, 7))
    assert alone == digests(before)


def test_phases_begin_at_their_step(mixed):
    mixed.data.phases = [{"from_step": 4, "weights": {"a": 1}}]
    found = batches(partial(open_stream, mixed), 6, [{"dp": 2, "batches": 2}, {"dp": 3}])
    assert [set(sources_of(rows)) for rows in found[3:]] == [{"a"}] * 3
    assert len(sources_of(found[2])) == 3


@pytest.mark.parametrize("packing", ["concatenated", "best_fit"])
def test_a_source_that_ends_yields_every_token_once_and_the_others_keep_their_proportions(mixed, packing):
    ended(mixed)
    opener = partial(open_stream, mixed, packing=packing)
    found = batches(opener, 60)
    last = {name: max(n for n, rows in enumerate(found) if name in sources_of(rows)) for name in WEIGHTS}
    assert last["c"] < last["a"] < 57 and last["b"] == 59
    text = bytes(t for rows in found for t in rows.tokens.flatten().tolist() if t < 256)
    held = sum(n % 90 + 1 for n in range(200))
    assert text.count(b"a") == 2 * held
    assert text.count(b"c") == held
    between = sum(map(sources_of, found[last["c"] + 1 : last["a"]]), Counter())
    assert abs(between["a"] - between.total() * 5 / 8) <= 3


@pytest.mark.long
def test_where_and_how_often_a_run_is_started_does_not_show_where_its_sources_end(mixed):
    ended(mixed)
    opener = partial(open_stream, mixed)
    expected = digests(batches(opener, 52))
    for first in (3, 30, 32, 33, 34, 35, 44, 46, 47, 49):
        splits = [{"dp": 4, "batches": first}, {"dp": 2, "peers": 2, "batches": 1}, {"dp": 3, "workers": 1}]
        assert digests(batches(opener, 52, splits)) == expected, first


def test_a_rare_source_has_all_rows_at_hand_when_the_others_end(mixed):
    """Within the period at whose assignment that becomes known: windows are assigned for it once more."""
    mixed.data.shuffle_window, mixed.data.split_bytes = 1, 64  # two rows
    mixed.data.sources["a"] |= {"max_epochs": 1, "weight": 100}
    mixed.data.sources["b"]["weight"] = 1
    del mixed.data.sources["c"]
    opener = partial(open_stream, mixed)
    found = batches(opener, 25)
    assert sources_of(found[5])["a"] >= 23 and set(sources_of(found[-1])) == {"b"}
    splits = [{"dp": 4, "batches": 11}, {"dp": 2, "peers": 2, "batches": 1}, {"dp": 3, "workers": 1}]
    assert digests(batches(opener, 25, splits)) == digests(found)


def test_the_data_end_when_every_source_has_ended(mixed):
    for source in mixed.data.sources.values():
        source["max_epochs"] = 1
    opener = partial(open_stream, mixed)
    found = batches(opener, None)
    tokens = [token for rows in found for token in rows.tokens.flatten().tolist()]
    held = sum(n % 90 + 1 for n in range(200))
    assert [tokens.count(ord(name)) for name in WEIGHTS] == [held] * 3
    padding = [(rows.labels == IGNORE_INDEX).all(1) for rows in found]
    assert not torch.cat(padding[:-1]).any()
    splits = [{"dp": 4, "batches": len(found) - 2}, {"dp": 3, "batches": 1}, {"dp": 2, "peers": 2}]
    assert digests(batches(opener, None, splits)) == digests(found)


def test_weights_may_change_while_a_source_gives_its_last_rows(mixed):
    ended(mixed)
    opener = partial(open_stream, mixed)
    with World(opener, dp=2) as world:
        found = []
        while world.state()["sources"]["a"]["tail"] is None:
            found += world.batches(1)
        state = world.state()
    first, rows = state["sources"]["a"]["tail"]
    assert sum(map(sources_of, found), Counter())["a"] < first + rows
    mixed.data.weights = {"a": 1, "b": 3}
    expected = None
    for layout in ({"dp": 3}, {"dp": 4, "workers": 1}):
        with World(opener, **layout) as world:
            world.load(state)
            after = world.batches(60)
        expected = expected or digests(after)
        assert digests(after) == expected
    text = [token for rows in found + after for token in rows.tokens.flatten().tolist()]
    assert text.count(ord("a")) == 2 * sum(n % 90 + 1 for n in range(200))


def ended(mixed) -> None:
    mixed.data.sources["a"]["max_epochs"] = 2
    mixed.data.sources["c"]["max_epochs"] = 1
    mixed.data.sources["c"]["weight"] = 4


def test_a_mixture_of_lanes_needs_weights(mixed):
    for source in mixed.data.sources.values():
        del source["weight"]
    with pytest.raises(ValueError, match=r"data.sources.a needs a weight"):
        open_stream(mixed)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=6))
def test_the_shares_of_a_long_run_are_its_weights(shares):
    """As `StreamRows` asks for them, stream row by stream row, far into a run and up to a change of weights."""
    whole, streams = whole_weights(shares), 64
    mixture = StreamMixture([Weights(1, whole), Weights(1001, whole[::-1])], streams)
    limits = (None,) * len(whole)
    counts = np.zeros(len(whole))
    for first in range(0, 1000, 250):
        sources, _ = mixture.assign(np.arange(first * streams, (first + 250) * streams), limits)
        counts += np.bincount(sources, minlength=len(whole))
    assert np.abs(counts / counts.sum() - np.array(whole) / sum(whole)).max() < 1e-4
