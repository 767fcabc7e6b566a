"""The one idea, over every layout: all factorisations of 1 and 2 ranks compute one process's run.

Of 4 ranks, and some of 8: `test_parity_of_four`.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed as dist

from stoker.conf.schema import Config
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import GRADIENT, PARAMETER, Shard
from stoker.trainer.parallelize import cut
from tests import world
from tests.extent import some
from tests.parallel.conformance import train as train_poisoned
from tests.parallel.parity import (
    OF_EIGHT,
    STEPS,
    Case,
    assert_every_case,
    assert_parity,
    cases,
    layouts,
    train,
)
from tests.parallel.reference import assemble, global_rows, normwise, one_process, small_config


@pytest.mark.parametrize("layout", [*layouts(1), *layouts(2)], ids=str)
def test_every_layout_computes_what_one_process_computes(layout: Layout) -> None:
    assert_every_case(layout)


@pytest.mark.long
@pytest.mark.parametrize(
    "layout", [Layout(1, 1, 2), Layout(1, 2, 2, 1, 3), Layout(1, 1, 4), Layout(1, 1, 2, 2)], ids=str
)
def test_tensor_parallelism_without_sequence_parallelism_computes_the_same(layout: Layout) -> None:
    assert_parity(layout, [Case(4, tied=tied, sequence=False) for tied in (False, True)])


@pytest.mark.long
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(1, 2, 2, 1, 3), Layout(tp=3), Layout(1, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("sequence", some([True, False], 2))
def test_a_users_model_with_biases_everywhere_computes_the_same(layout: Layout, sequence: bool) -> None:
    def config(layout: Layout) -> Config:
        config = Case(4, sequence=sequence).config(layout)
        config.model = small_config().model  # tests.toy
        return config

    ranks = [found[0] for found in world.run(train, layout.world, [config(layout)])]
    wanted = one_process(config(Layout()), STEPS)
    assert ranks[0].trace.losses == pytest.approx(wanted.losses, rel=1e-5)
    assert ranks[0].trace.norms == pytest.approx(wanted.norms, rel=1e-5)
    gradients, parameters = assemble([r.gradients for r in ranks], GRADIENT), assemble([r.parameters for r in ranks])
    for name, value in wanted.parameters.items():
        assert normwise(gradients[name], wanted.gradients[name]) < 1e-5, name
        assert normwise(parameters[name], value) < 1e-4, name


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(1, 2, 1, 2, 2), Layout(2, 1, 1, 2)], ids=str)
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_stage_with_nothing_to_train_stays_as_it_is(layout: Layout, schedule: str) -> None:
    def config(layout: Layout) -> Config:
        config = Case(2, schedule).config(layout)
        config.model = small_config().model
        config.model.target = "tests.toy:build_with_frozen_start"
        return config

    ranks = [found[0] for found in world.run(train, layout.world, [config(layout)])]
    wanted = one_process(config(Layout()), STEPS)
    assert ranks[0].trace.norms == pytest.approx(wanted.norms, rel=1e-5)
    parameters = assemble([rank.parameters for rank in ranks])
    for name, value in wanted.parameters.items():
        assert normwise(parameters[name], value) < 1e-4, name


@pytest.mark.long
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(1, 2, 2, 1, 3), Layout(1, 2, 1, 2, 1)], ids=str)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(layout: Layout) -> None:
    case = Case(4, tied=True)
    results = world.run(train_poisoned, layout.world, case.config(layout), "fsdp", STEPS, 3)
    wanted = one_process(case.config(Layout()), STEPS, poison=3)
    for trace, _ in results:
        assert trace.skipped == wanted.skipped and trace.tokens == wanted.tokens
    parameters = assemble([shards for _, shards in results])
    for name, value in wanted.parameters.items():
        assert normwise(parameters[name], value) < 1e-4, name


def evaluated(config: Config) -> tuple[float, float, list[Shard]]:
    """On a rank: the mean loss of the first batch without training, that of a part of it, and the gradients left."""
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    mine = global_rows(config, 1)[mesh.dp_rank :: layout.dp]
    (loss, tokens), (some_loss, some_tokens) = (mesh.all_reduce(engine.evaluate(rows)) for rows in (mine, mine[:3]))
    return float(loss / tokens), float(some_loss / some_tokens), engine.gradient_shards()


@pytest.mark.parametrize(
    "layout", [Layout(tp=2), Layout(1, 2, 2, 1, 3), Layout(1, 1, 2, 2), Layout(2, 1, 1, 2)], ids=str
)
def test_evaluation_in_the_layout_of_training_gives_the_loss_of_one_process(layout: Layout) -> None:
    """Of rows whose tokens divide over tp by the micro-batch, but not one by one."""

    def config(layout: Layout) -> Config:
        found = Case(2, tied=True).config(layout)
        found.seq_len = 11
        return found

    alone = config(Layout())
    loss, some_loss, _ = world.run(evaluated, layout.dp, config(Layout(layout.dp)))[0]
    assert loss == pytest.approx(one_process(alone, 1).losses[0], rel=1e-5)
    for rank in world.run(evaluated, layout.world, config(layout)):
        assert rank[:2] == pytest.approx((loss, some_loss), rel=1e-5)
        assert not any(shard.data.any() for shard in rank[2]), "evaluation leaves no gradient"


def initial(config: Config) -> list[Shard]:
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    return [shard for shard in cut(config, mesh, batch_plan(config, layout)).shards() if shard.kind == PARAMETER]


@pytest.mark.parametrize(
    "layout", [Layout(1, 2, 2, 1, 3), Layout(1, 1, 4), Layout(1, 1, 2, 2), Layout(1, 1, 1, 4)], ids=str
)
def test_initial_weights_are_bitwise_those_of_one_process(layout: Layout) -> None:
    config = Case(2, tied=True).config(layout)
    alone = one_process(Case(1, tied=True).config(Layout()), 0).parameters
    for name, value in assemble(world.run(initial, layout.world, config)).items():
        assert torch.equal(value, alone[name]), name


def test_no_two_layers_start_with_the_same_weights() -> None:
    found = assemble(world.run(initial, 2, Case(2).config(Layout(pp=2))))
    drawn = [name for name, value in found.items() if value.dim() > 1]
    for one, other in itertools.combinations(drawn, 2):
        if found[one].shape == found[other].shape:
            assert not torch.equal(found[one], found[other]), (one, other)


@pytest.mark.long
@pytest.mark.parametrize("layout", [Layout(1, 2, 2, 1, 3), Layout(1, 2, 1, 2, 2)], ids=str)
def test_the_same_layout_twice_is_bitwise_equal(layout: Layout) -> None:
    config = Case(4, tied=True).config(layout)
    for first, second in world.run(train, layout.world, [config, copy.deepcopy(config)]):
        assert first.trace == second.trace
        for one, other in zip(first.parameters, second.parameters, strict=True):
            assert torch.equal(one.data, other.data), one.name


@pytest.mark.gpu
@pytest.mark.parametrize(
    "layout", [*layouts(1), *layouts(2), *layouts(4), *(layout for layout, _ in OF_EIGHT)], ids=str
)
def test_layouts_over_nccl_compute_what_one_process_on_a_cpu_computes(layout: Layout) -> None:
    if torch.cuda.device_count() < layout.world:
        pytest.skip(f"needs {layout.world} GPUs, there are {torch.cuda.device_count()}")
    assert_parity(layout, [case for case in cases(layout) if case.schedule != "interleaved"], device="cuda")
