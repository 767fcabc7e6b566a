"""The one idea, over every layout: all factorisations of 1, 2 and 4 ranks, some of 8, compute one process's run.

The model is the decoder, with fewer kv heads than some tp, a vocabulary that no tp divides, documents of very unequal
length and, where dp is 4, a rank without a single valid token.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import torch.distributed as dist

from stoker.conf.schema import BatchConfig, Config, ModelConfig, OptimConfig, ParallelConfig
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import GRADIENT, PARAMETER, Shard
from stoker.trainer.parallelize import cut
from tests import world
from tests.parallel.reference import VOCABULARY, Trace, assemble, global_rows, normwise, one_process, small_config
from tests.parallel.test_conformance import train as train_poisoned

STEPS = 10
ROWS = 16
FULL = os.environ.get("STOKER_TESTS") == "full"  # every combination instead of every pair: another ten minutes


@dataclass(frozen=True)
class Case:
    """What varies over a layout: micro-batches, the schedule of its pipeline, the model and the optimizer."""

    micro: int
    schedule: str = "1f1b"
    tied: bool = False
    optimizer: str = "adamw"
    sequence: bool = True

    def config(self, layout: Layout, layers: int = 4) -> Config:
        model = ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            tie_word_embeddings=self.tied,
        )
        config = small_config(model=model, batch=BatchConfig(size=ROWS, micro_size=self.micro))
        config.data.document_mask = True
        config.optim = OptimConfig(name="adamw", lr=3e-3)  # at 1e-2 rounding alone grows to 1e-5 within ten steps
        config.parallel = ParallelConfig(
            tp=layout.tp,
            pp=layout.pp,
            zero=layout.zero,
            dp_replicate=layout.dp_replicate,
            schedule=self.schedule,
            stages_per_rank=2 if self.schedule == "interleaved" else 1,
            sequence_parallel=self.sequence,
        )
        if self.optimizer == "sgd":
            config.optim = OptimConfig(name="sgd", lr=0.1, momentum=0.9)
        return config


@dataclass(frozen=True)
class Measured:
    """What one rank saw of one case."""

    trace: Trace
    gradients: list[Shard]
    parameters: list[Shard]


def train(configs: list[Config], steps: int = STEPS) -> list[Measured]:
    """On a rank: every config, all of the same layout, from the start."""
    layout = layout_of(configs[0], dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    found = []
    for config in configs:
        engine = cut(config, mesh, batch_plan(config, layout))
        trace, gradients = Trace(), []
        for step in range(1, steps + 1):
            engine.forward_backward(global_rows(config, step)[mesh.dp_rank :: layout.dp])
            if step == 1:
                gradients = [replace(s, data=s.data.cpu()) for s in engine.gradient_shards()]
            result = engine.update(config.optim.lr).read()
            trace.losses.append(result.loss)
            trace.norms.append(result.grad_norm)
            trace.tokens.append(result.tokens)
        parameters = [replace(s, data=s.data.cpu().clone()) for s in engine.shards() if s.kind == PARAMETER]
        found.append(Measured(trace, gradients, parameters))
    return found


def factorisations(ranks: int) -> Iterator[tuple[int, int, int, int]]:
    """(dp_replicate, dp_shard, tp, pp) of `ranks` ranks."""
    sizes = [n for n in range(1, ranks + 1) if ranks % n == 0]
    for sizes_of in itertools.product(sizes, repeat=4):
        if sizes_of[0] * sizes_of[1] * sizes_of[2] * sizes_of[3] == ranks:
            yield sizes_of


def layouts(ranks: int) -> Iterator[Layout]:
    """Every factorisation with every ZeRO stage: 1 to 3 where something is sharded, else 0."""
    for replicate, shard, tp, pp in factorisations(ranks):
        for zero in (1, 2, 3) if shard > 1 else (0,):
            yield Layout(replicate, shard, tp, pp, zero)


def cases(layout: Layout) -> list[Case]:
    """Every schedule with as few micro-batches as it takes and with more; tied or not and the optimizer take turns, so
    that all pairs occur.

    The ZeRO stage shifts the turns: what one layout leaves out another one takes. `FULL` is the whole product.
    """
    rows = ROWS // layout.dp
    schedules = ("1f1b", "gpipe", "interleaved") if layout.pp > 1 else ("1f1b",)
    found = []
    for turn, schedule in enumerate(schedules, layout.zero + layout.tp):
        stages = layout.pp * (2 if schedule == "interleaved" else 1)
        most = 8 if FULL else max(4, 2 * stages)  # with four there is one that is neither the first nor the last
        counts = [count for count in (8, 4, 2, 1) if rows % count == 0 and stages <= count <= most]
        for number, count in enumerate((counts[0], counts[-1])):
            optimizer = "sgd" if (turn + number) % 4 in (1, 2) else "adamw"
            case = Case(rows // count, schedule, tied=(turn + number) % 2 == 0, optimizer=optimizer)
            found += [case, replace(case, tied=not case.tied)] if FULL else [case]
    return found


@cache
def expected(tied: bool, optimizer: str, layers: int = 4) -> Trace:
    return one_process(Case(1, tied=tied, optimizer=optimizer).config(Layout(), layers), STEPS)


def assert_parity(layout: Layout, chosen: list[Case], layers: int = 4, device: str = "cpu") -> None:
    configs = [case.config(layout, layers) for case in chosen]
    measured = world.run(train, layout.world, configs, timeout=240.0, device=device)
    for case, ranks in zip(chosen, zip(*measured, strict=True), strict=True):
        where, wanted = f"{layout}, {case}", expected(case.tied, case.optimizer, layers)
        assert all(rank.trace == ranks[0].trace for rank in ranks), f"{where}: ranks disagree about a step"
        trace = ranks[0].trace
        assert trace.tokens == wanted.tokens, where
        assert trace.losses == pytest.approx(wanted.losses, rel=1e-5), where
        assert trace.norms == pytest.approx(wanted.norms, rel=1e-5), where
        gradients = assemble([rank.gradients for rank in ranks], GRADIENT)
        parameters = assemble([rank.parameters for rank in ranks])
        assert gradients.keys() == wanted.gradients.keys(), where
        for name, value in wanted.gradients.items():
            assert normwise(gradients[name], value) < 1e-5, f"{where}: gradient of {name}"
        for name, value in wanted.parameters.items():
            tolerance = 1e-6 if case.optimizer == "sgd" else 1e-4
            assert normwise(parameters[name], value) < tolerance, f"{where}: {name}"


@pytest.mark.parametrize("layout", [*layouts(1), *layouts(2), *layouts(4)], ids=str)
def test_every_layout_computes_what_one_process_computes(layout: Layout) -> None:
    if layout.pp == 4:  # eight stages want eight layers, in which AdamW lets one process's own rounding grow past 1e-5
        assert_parity(layout, [case for case in cases(layout) if case.schedule != "interleaved"])
        deep = [replace(case, optimizer="sgd") for case in cases(layout) if case.schedule == "interleaved"]
        assert_parity(layout, deep, layers=8)
    else:
        assert_parity(layout, cases(layout))


OF_EIGHT = [
    (Layout(2, 2, 2, 1, 3), Case(2, tied=True)),
    (Layout(1, 2, 2, 2, 2), Case(2, "1f1b", tied=True)),
    (Layout(2, 1, 2, 2, 0), Case(1, "gpipe", optimizer="sgd")),
    (Layout(1, 2, 2, 2, 3), Case(1, "interleaved", tied=True, optimizer="sgd")),
    (Layout(1, 2, 1, 4, 1), Case(2, "1f1b")),
    (Layout(1, 1, 4, 2, 0), Case(4, "interleaved", tied=True)),
]


@pytest.mark.parametrize(("layout", "case"), OF_EIGHT, ids=str)
def test_eight_ranks_compute_what_one_process_computes(layout: Layout, case: Case) -> None:
    assert_parity(layout, [case])


@pytest.mark.parametrize(
    "layout", [Layout(1, 1, 2), Layout(1, 2, 2, 1, 3), Layout(1, 1, 4), Layout(1, 1, 2, 2)], ids=str
)
def test_tensor_parallelism_without_sequence_parallelism_computes_the_same(layout: Layout) -> None:
    assert_parity(layout, [Case(4, tied=tied, sequence=False) for tied in (False, True)])


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(1, 2, 2, 1, 3), Layout(tp=3), Layout(1, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("sequence", [True, False])
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
