"""Counts and biases of experts that ranks share: those of one process, to the last bit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest

from stoker.conf.schema import Config
from stoker.parallel.layout import Layout
from tests import world
from tests.extent import FULL, some
from tests.parallel.parity import Case
from tests.parallel.test_expert_balance import ALONE, Seen, assert_same_routes, config_of, train

EXPERTS = 8
TWO = Layout(dp_shard=2, zero=3, ep=2)
FOUR = [
    Layout(dp_shard=4, zero=1, ep=4),
    Layout(dp_shard=2, tp=2, zero=3, ep=2),
    Layout(dp_replicate=2, dp_shard=2, zero=2, ep=2),
    Layout(dp_replicate=2, tp=2, ep=2),
    Layout(dp_replicate=4, ep=4),
    Layout(dp_shard=2, pp=2, zero=1, ep=2),
    Layout(dp_shard=2, cp=2, zero=3, ep=4),
]
FORMS = list(itertools.product((1, 2, 4), ("none", "full", "selective")))  # micro-batches, recomputed activations


def shared(case: Case, layout: Layout, checkpointing: str, dispatcher: str = "alltoall") -> Config:
    config = config_of(case, layout, checkpointing)
    config.model = replace(config.model, num_experts=EXPERTS)
    config.parallel.token_dispatcher = dispatcher
    return config


@cache
def alone() -> Seen:
    (seen,) = world.run(train, 1, shared(*ALONE))
    return seen


def turns(first: int, every: int) -> list[tuple[int, str, str]]:
    """Micro-batches, recomputed activations and ways of sending tokens, beginning with the form of number `first`."""
    ways = itertools.cycle(("alltoall", "allgather"))
    return some([(*form, next(ways)) for form in FORMS[first:] + FORMS[:first]], every)


def assert_routes(layout: Layout, micro: int, checkpointing: str, dispatcher: str) -> None:
    config = shared(Case(micro), layout, checkpointing, dispatcher)
    found = world.run(train, layout.world, config, timeout=300.0)
    assert_same_routes(f"{layout}, {micro}, {checkpointing}, {dispatcher}", found, alone())


def test_selective_recomputation_goes_through_experts_that_are_units_of_their_own() -> None:
    assert_routes(replace(TWO, zero=1), 4, "selective", "alltoall")


@pytest.mark.long
@pytest.mark.parametrize("form", [(4, "none", "alltoall"), *(turns(0, 1) if FULL else ())], ids=str)
def test_two_ranks_count_and_move_biases_as_one_process(form: tuple[int, str, str]) -> None:
    assert_routes(TWO, *form)


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "form"),
    [(layout, form) for turn, layout in some(list(enumerate(FOUR)), 6) for form in turns(turn, 9)],
    ids=str,
)
def test_every_layout_counts_and_moves_biases_as_one_process(layout: Layout, form: tuple[int, str, str]) -> None:
    assert_routes(layout, *form)
