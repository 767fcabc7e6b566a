"""Experts shared over ranks compute what one process computes, whatever shares the rest of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest

from stoker.conf.schema import Config
from stoker.parallel.layout import Layout
from stoker.parallel.shards import GRADIENT
from tests import world
from tests.extent import some
from tests.parallel.experts.sparse import CHOICES, EXPERTS
from tests.parallel.parity import ROWS, STEPS, Case, Measured, assert_same, train
from tests.parallel.reference import Trace, assemble, one_process
from tests.parallel.test_expert_models import matrices


@dataclass(frozen=True)
class Sparse:
    """What varies over a layout."""

    case: Case
    dispatcher: str = "alltoall"
    skew: float = 0.0
    expert_tp: bool = False
    recomputed: str = "none"
    dense: bool = False  # the first layer
    experts: int = EXPERTS
    choices: int = CHOICES
    compiled: bool = False

    def config(self, layout: Layout) -> Config:
        config = self.case.config(layout)
        config.model.target = "tests.parallel.experts.sparse:build"
        config.model.args = {
            "skew": self.skew,
            "dense": self.dense,
            "experts": self.experts,
            "choices": self.choices,
        }
        config.compile = self.compiled
        config.parallel.ep, config.parallel.token_dispatcher = layout.ep, self.dispatcher
        config.parallel.expert_tp = self.expert_tp
        config.activation_checkpointing = self.recomputed
        return config


@cache
def expected(skew: float, dense: bool, experts: int, choices: int, optimizer: str) -> Trace:
    alone = Sparse(Case(1, optimizer=optimizer), skew=skew, dense=dense, experts=experts, choices=choices)
    return one_process(alone.config(Layout()), STEPS)


def assert_parity(layout: Layout, chosen: list[Sparse]) -> list[tuple[Measured, ...]]:
    """What the ranks measured, of each of `chosen`."""
    measured = world.run(train, layout.world, [sparse.config(layout) for sparse in chosen], timeout=500.0)
    found = list(zip(*measured, strict=True))
    for sparse, ranks in zip(chosen, found, strict=True):
        wanted = expected(sparse.skew, sparse.dense, sparse.experts, sparse.choices, sparse.case.optimizer)
        assert_same(f"{layout}, {sparse}", ranks, wanted, 1e-6 if sparse.case.optimizer == "sgd" else 1e-4)
    return found


def layouts() -> Iterator[Layout]:
    """Every degree at every ZeRO stage, alone and with each other axis, on as few ranks as it takes."""
    for ep in (2, 4, 1):
        for axis in ("tp", "pp", "cp", ""):
            ranks = max(2, ep) // (2 if axis == "cp" else 1)  # that read different rows
            for zero in range(4):
                wide = {axis: 2} if axis else {}
                yield Layout(1 if zero else ranks, ranks if zero else 1, zero=zero, ep=ep, **wide)
    for zero in (1, 2, 3):
        yield Layout(2, 2, zero=zero, ep=2)  # replicas of the experts
        yield Layout(1, 4, zero=zero, ep=2)  # which ZeRO shards
    yield Layout(4, ep=2)
    yield Layout(1, 2, cp=2, zero=3, ep=2)
    for ep in (2, 4, 8):  # of eight ranks
        yield Layout(8, ep=ep)
        for zero in (1, 2, 3):
            yield Layout(1, 8, zero=zero, ep=ep)
            if ep < 8:
                yield Layout(2, 4, zero=zero, ep=ep)
    for zero in (1, 2, 3):
        yield Layout(1, 2, 2, 2, zero=zero, ep=2)
        yield Layout(2, 2, 2, zero=zero, ep=2)
        yield Layout(1, 2, pp=2, cp=2, zero=zero, ep=2)
        yield Layout(1, 2, 2, zero=zero, cp=2, ep=4)


def cases(layout: Layout, turn: int) -> list[Sparse]:
    """Micro-batches of each size that fits, what else varies taking turns."""
    found = []
    for number, micro in enumerate(some([1, 2, 4], 2), turn):
        if ROWS // layout.dp // micro < layout.pp:
            continue
        found.append(
            Sparse(
                Case(micro, sequence=number % 3 != 2, optimizer=("adamw", "sgd")[number // 2 % 2]),
                ("alltoall", "allgather")[number % 2],
                skew=30.0 if number % 4 == 1 else 0.0,
                expert_tp=layout.tp > 1 and number % 2 == 0,
                recomputed=("none", "full", "selective")[number % 3],
                dense=number % 5 == 0,
            )
        )
    return found


@pytest.mark.parametrize("zero", [0, *(pytest.param(zero, marks=pytest.mark.long) for zero in (1, 2)), 3])
def test_two_ranks_with_half_of_the_experts_each(zero: int) -> None:
    layout = Layout(1, 2, zero=zero, ep=2) if zero else Layout(2, ep=2)
    assert_parity(layout, [Sparse(Case(4)), Sparse(Case(8), "allgather", skew=30.0)])


TURNS = [(layout, turn) for turn, layout in enumerate(layouts())]


@pytest.mark.long
@pytest.mark.parametrize(("layout", "turn"), some([turn for turn in TURNS if turn[0].world <= 4], 22), ids=str)
def test_every_layout_computes_what_one_process_computes(layout: Layout, turn: int) -> None:
    assert_parity(layout, cases(layout, turn))


@pytest.mark.full
@pytest.mark.parametrize(("layout", "turn"), [turn for turn in TURNS if turn[0].world == 8], ids=str)
def test_eight_ranks_compute_what_one_process_computes(layout: Layout, turn: int) -> None:
    assert_parity(layout, cases(layout, turn))


@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.long)])
def test_all_tokens_to_one_expert_leave_the_others_a_gradient_of_zero(zero: int) -> None:
    """The second rank of two computes no token."""
    layout = Layout(1, 2, zero=zero, ep=2) if zero else Layout(2, ep=2)
    one = [Sparse(Case(4), dispatcher, skew=30.0, choices=1) for dispatcher in ("alltoall", "allgather")]
    for sparse, ranks in zip(one, assert_parity(layout, one), strict=True):
        gradients = assemble([rank.gradients for rank in ranks], GRADIENT)
        of_experts = {name: value for name, value in gradients.items() if ".experts." in name}
        assert len(of_experts) == 2 * 4, "no gradient is missing"
        for name, value in of_experts.items():
            assert value[0].any() and not value[1:].any(), f"{sparse}: {name}"


@pytest.mark.long
def test_experts_that_are_fewer_than_the_ranks_that_shard_them_are_cut_by_rows() -> None:
    assert_parity(Layout(1, 4, zero=3, ep=2), [Sparse(Case(2), experts=2)])


@pytest.mark.full
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_compiled_blocks_compute_the_same(dispatcher: str) -> None:
    modes = ("none", "full", "selective")
    assert_parity(Layout(2, ep=2), [Sparse(Case(8), dispatcher, recomputed=mode, compiled=True) for mode in modes])


@pytest.mark.long
@pytest.mark.parametrize("rule", some(["muon", "lamb", "lion"], 2))
def test_rules_that_look_at_whole_matrices(rule: str) -> None:
    for layout in some([Layout(1, 2, zero=3, ep=2), Layout(2, ep=2), Layout(2, 2, zero=1, ep=2)], 2):
        sparse = Sparse(Case(4, optimizer=rule))
        wanted = one_process(sparse.config(Layout()), 4, matrices_of=matrices)
        ranks = [found[0] for found in world.run(train, layout.world, [sparse.config(layout)], 4)]
        assert_same(f"{layout}, {rule}", ranks, wanted, 1e-6 if rule == "lion" else 1e-4)
