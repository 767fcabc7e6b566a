"""Several sources in lanes: rows in the proportions of the weights, whatever reads them."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest

from tests.data.lanes.conftest import open_stream, write_lines
from tests.data.lanes.simulated import World, batches, digests

WEIGHTS = {"a": 5, "b": 3, "c": 0.5}


@pytest.fixture
def mixed(config, tmp_path):
    """Three endless sources of documents of one letter each."""
    for name in WEIGHTS:
        write_lines(tmp_path / name, [name * (n % 90 + 1) for n in range(200)])
    kinds = {"kind": "text", "validation": 0.0}
    config.data.sources = {n: {**kinds, "path": str(tmp_path / n), "weight": w} for n, w in WEIGHTS.items()}
    config.data.path, config.data.units, config.data.epochs = None, None, None
    return config


def sources_of(rows) -> Counter:
    found = Counter()
    for row in rows.tokens.tolist():
        letters = {chr(token) for token in row if token < 256}
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


def test_other_weights_hold_from_the_row_at_which_the_run_goes_on(mixed):
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
    for rows in before + after:  # the order of a source is its own: b goes on where it was
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


def test_a_mixture_of_lanes_needs_weights_and_has_no_end(mixed):
    mixed.data.epochs = 2
    with pytest.raises(
        ValueError, match=r"data.sources.a ends after 2 epochs: under planner=lanes a mixture has no end"
    ):
        open_stream(mixed)
    mixed.data.epochs = None
    for source in mixed.data.sources.values():
        del source["weight"]
    with pytest.raises(ValueError, match=r"data.sources.a needs a weight"):
        open_stream(mixed)
