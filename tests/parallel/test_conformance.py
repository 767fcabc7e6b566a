"""One suite for every engine: it computes what one process in plain torch computes."""

from __future__ import annotations

import math

import pytest
import torch

from stoker.conf.schema import BatchConfig, OptimConfig, ParallelConfig
from stoker.parallel.update import ControlFlag
from tests import world
from tests.extent import some
from tests.parallel.conformance import (
    SGD,
    STEPS,
    agreed_votes,
    evaluated,
    gathered_measurements,
    initial_shards,
    moved_through_shards,
    reference,
    step_without_a_valid_token,
    train,
)
from tests.parallel.reference import Trace, assemble, normwise, one_process, small_config


def assert_same(trace: Trace, expected: Trace, parameters: dict[str, torch.Tensor], tolerance: float) -> None:
    assert trace.tokens == expected.tokens
    assert trace.losses == pytest.approx(expected.losses, rel=1e-5)
    assert trace.norms == pytest.approx(expected.norms, rel=1e-5)
    for name, value in expected.parameters.items():
        assert normwise(parameters[name], value) < tolerance, name


LAYOUTS = [
    *[(1, 0, None, micro) for micro in (1, 2, 4, 8)],
    *[(2, zero, None, micro) for zero in (0, 1, 2, 3) for micro in (1, 2, 4)],
    *[(4, zero, None, micro) for zero in (0, 1, 2, 3) for micro in (1, 2)],
    *[(4, zero, 2, micro) for zero in (1, 2, 3) for micro in (1, 2)],
]


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("ranks", "zero", "replicas", "micro"), some(LAYOUTS, 3))
def test_every_layout_computes_what_one_process_computes(
    ranks: int, zero: int, replicas: int | None, micro: int, optimizer: str
) -> None:
    parallel = ParallelConfig(zero=zero, dp_replicate=replicas)
    config = small_config(parallel=parallel, batch=BatchConfig(size=8, micro_size=micro))
    if optimizer == "sgd":
        config.optim = SGD
    results = world.run(train, ranks, config)
    assert all(trace == results[0][0] for trace, _ in results), "ranks disagree about the result of a step"
    parameters = assemble([shards for _, shards in results])
    assert_same(results[0][0], reference(optimizer), parameters, 1e-6 if optimizer == "sgd" else 1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_toy_engine_conforms_too(optimizer: str) -> None:
    config = small_config(optim=SGD) if optimizer == "sgd" else small_config()
    config.batch = BatchConfig(size=8, micro_size=2)
    results = world.run(train, 2, config, "toy")
    parameters = assemble([shards for _, shards in results])
    assert_same(results[0][0], reference(optimizer), parameters, 1e-6 if optimizer == "sgd" else 1e-4)


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 0), (2, 2), (2, 3)])
def test_what_is_frozen_stays_and_the_rest_trains_as_in_one_process(ranks: int, zero: int) -> None:
    config = small_config(parallel=ParallelConfig(zero=zero))
    config.model.target = "tests.toy:build_frozen"
    config.batch = BatchConfig(size=8, micro_size=2)
    config.optim.weight_decay = 0.5
    results = world.run(train, ranks, config)
    parameters = assemble([shards for _, shards in results])
    assert_same(results[0][0], one_process(config, STEPS), parameters, 1e-4)
    initial = one_process(config, 0).parameters
    for name in ("layers.0.inner.weight", "layers.0.outer.bias", "head.weight"):
        assert torch.equal(parameters[name], initial[name]), name


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 1), (2, 3)])
def test_a_users_optimizer_computes_the_same_and_skips_steps_that_are_not_finite(ranks: int, zero: int) -> None:
    config = small_config(parallel=ParallelConfig(zero=zero))
    theirs = {"betas": config.optim.betas, "eps": config.optim.eps}
    config.optim = OptimConfig(target="tests.toy:adamw_without_kernels", lr=config.optim.lr, args=theirs)
    results = world.run(train, ranks, config, "fsdp", STEPS, 3)
    expected = one_process(small_config(), STEPS, poison=3)
    parameters = assemble([shards for _, shards in results])
    for name, value in expected.parameters.items():
        assert normwise(parameters[name], value) < 1e-4, name


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_gradient_is_that_of_one_process(zero: int) -> None:
    """With plain SGD the change of a parameter over the learning rate is its gradient."""
    plain = OptimConfig(name="sgd", lr=64.0, weight_decay=0.0)
    config = small_config(optim=plain, grad_clip_norm=None, parallel=ParallelConfig(zero=zero))
    config.batch = BatchConfig(size=8, micro_size=1)
    before = one_process(config, 0).parameters
    expected = one_process(config, 1).parameters
    after = assemble([shards for _, shards in world.run(train, 2, config, "fsdp", 1)])
    for name in before:
        assert normwise(after[name] - before[name], expected[name] - before[name]) < 1e-5, name


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_a_layout_run_twice_is_bitwise_equal(ranks: int, zero: int) -> None:
    config = small_config(parallel=ParallelConfig(zero=zero), precision="bf16")
    first, second = (world.run(train, ranks, config) for _ in range(2))
    for (trace, shards), (trace_again, shards_again) in zip(first, second, strict=True):
        assert trace == trace_again
        assert all(torch.equal(a.data, b.data) for a, b in zip(shards, shards_again, strict=True))


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 0), (2, 1), (2, 3)])
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_by_all(ranks: int, zero: int) -> None:
    config = small_config(parallel=ParallelConfig(zero=zero))
    results = world.run(train, ranks, config, "fsdp", 4, 2)
    expected = one_process(config, 4, poison=2)
    for trace, _ in results:
        assert trace.skipped == [False, True, False, False]
        assert not math.isfinite(trace.norms[1])
        assert [trace.losses[n] for n in (0, 2, 3)] == pytest.approx([expected.losses[n] for n in (0, 2, 3)], rel=1e-5)
    parameters = assemble([shards for _, shards in results])
    for name, value in expected.parameters.items():
        assert normwise(parameters[name], value) < 1e-4, name


def test_a_vote_of_one_rank_reaches_all() -> None:
    expected = [frozenset(), {ControlFlag.STOP}]
    assert world.run(agreed_votes, 2) == [expected, expected]


def test_every_rank_reads_what_each_has_measured() -> None:
    expected = ((1.0, 2.0), (1e12, 1e12 + 1))  # bytes to the last one
    assert world.run(gathered_measurements, 2) == [expected, expected]


def test_a_batch_without_a_valid_token_changes_nothing() -> None:
    assert world.run(step_without_a_valid_token, 2) == [(True, 0, True)] * 2


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_evaluation_gives_the_loss_of_training_and_leaves_no_gradient(zero: int) -> None:
    for evaluation, training in world.run(evaluated, 2, zero):
        assert evaluation == pytest.approx(reference("adamw").losses[0], rel=1e-5)
        assert training == pytest.approx(evaluation, rel=1e-6)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_shards_are_the_live_state(zero: int) -> None:
    assert all(world.run(moved_through_shards, 2, zero))


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_initial_weights_are_bitwise_equal_on_every_layout(ranks: int, zero: int) -> None:
    expected = one_process(small_config(), 0).parameters
    for name, value in assemble(world.run(initial_shards, ranks, zero)).items():
        assert torch.equal(value, expected[name]), name
