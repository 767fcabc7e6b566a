"""DeepSpeed as the store of weights: the same suite as for the other engine, and what we rely on in DeepSpeed.

Ranks are started few times and go through many cases: DeepSpeed takes its time to start.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stoker.conf.schema import BatchConfig, Config, OptimConfig, ParallelConfig
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import GRADIENT, PARAMETER, Shard
from stoker.parallel.update import ControlFlag
from stoker.trainer.parallelize import cut
from tests import world
from tests.extent import some
from tests.parallel import conformance
from tests.parallel.parity import STEPS, Case, Measured, expected, train
from tests.parallel.reference import Trace, assemble, global_rows, normwise, one_process, small_config

ENGINE = "deepspeed"


def config_of(layout: Layout, case: Case, **changes: Any) -> Config:
    config = case.config(layout)
    config.parallel.engine = ENGINE
    config.parallel.dp_replicate = layout.dp_replicate if layout.zero else None
    for key, value in changes.items():
        setattr(config.parallel, key, value)
    return config


def train_each(configs: list[Config]) -> list[Measured]:
    """On a rank: every config, each with another layout."""
    return [train([config])[0] for config in configs]


def assert_parity(ranks: int, cases: list[tuple[Layout, Case]], **changes: Any) -> None:
    configs = [config_of(layout, case, **changes) for layout, case in cases]
    measured = world.run(train_each, ranks, configs, timeout=300.0, fresh=True)
    for (layout, case), found in zip(cases, zip(*measured, strict=True), strict=True):
        where, wanted = f"{layout}, {case}, {changes}", expected(case.tied, case.optimizer)
        trace = found[0].trace
        assert all(rank.trace == trace for rank in found), f"{where}: ranks disagree about a step"
        assert trace.tokens == wanted.tokens, where
        assert trace.losses == pytest.approx(wanted.losses, rel=1e-5), where
        assert trace.norms == pytest.approx(wanted.norms, rel=1e-5), where
        gradients = assemble([rank.gradients for rank in found], GRADIENT)
        parameters = assemble([rank.parameters for rank in found])
        for name, value in wanted.parameters.items():
            assert normwise(gradients[name], wanted.gradients[name]) < 1e-5, f"{where}: gradient of {name}"
            tolerance = 1e-6 if case.optimizer == "sgd" else 1e-4
            assert normwise(parameters[name], value) < tolerance, f"{where}: {name}"


# Of 8 rows of a rank: four micro-batches, two, and one. Where tp sums in every layer, a micro-batch is dear.
ADAM, ADAM_OF_TWO, SGD = Case(2, tied=True), Case(4, tied=True), Case(8, optimizer="sgd")
STAGES = [Layout(2), *(Layout(1, 2, zero=zero) for zero in (1, 2, 3))]
ON_TWO = [
    *itertools.product(STAGES, (ADAM, SGD)),
    *[(Layout(tp=2, zero=zero), Case(8, tied=True)) for zero in (0, 1, 3)],
    (Layout(pp=2), ADAM),
    (Layout(pp=2), Case(2, "interleaved", optimizer="sgd")),
    (Layout(pp=2, zero=1), Case(2, "gpipe", tied=True)),
]
ON_FOUR = [
    *itertools.product([replace(layout, tp=2) for layout in STAGES], (ADAM_OF_TWO, SGD)),
    *[(Layout(2, 2, zero=zero), Case(4, optimizer="sgd")) for zero in (1, 2, 3)],  # replicas of what is sharded
    (Layout(1, 2, 1, 2, 1), ADAM_OF_TWO),
    (Layout(1, 1, 2, 2, 1), Case(4, "interleaved", tied=True, optimizer="sgd")),
    (Layout(tp=4, zero=2), Case(8, tied=True)),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "cases"), some([(1, [(Layout(zero=z), ADAM_OF_TWO) for z in range(4)]), (4, ON_FOUR), (2, ON_TWO)], 2)
)
def test_every_stage_computes_what_one_process_computes(ranks: int, cases: list[tuple[Layout, Case]]) -> None:
    assert_parity(ranks, cases)


def of_uneven_shares(config: Config) -> Config:
    """Of 51 tokens a rank has 25 or 26: a flat partition of all parameters would end behind a norm or within it."""
    config.model.vocab_size, config.model.intermediate_size, config.model.num_hidden_layers = 51, 8, 2
    return config


@pytest.mark.full
def test_ranks_with_shares_of_unequal_size_partition_alike_what_they_sum() -> None:
    layouts = [Layout(1, 2, 2, zero=zero) for zero in (1, 2, 3)]
    configs = [of_uneven_shares(config_of(layout, ADAM_OF_TWO)) for layout in layouts]
    wanted = one_process(of_uneven_shares(Case(2, tied=True).config(Layout())), STEPS)
    for measured in world.run(train_each, 4, configs, timeout=120.0, fresh=True):
        for config, found in zip(configs, measured, strict=True):
            assert found.trace.losses == pytest.approx(wanted.losses, rel=1e-5), config.parallel
            assert found.trace.norms == pytest.approx(wanted.norms, rel=1e-5), config.parallel


@pytest.mark.long
def test_offload_to_the_cpu_computes_the_same() -> None:
    layouts = [*STAGES, Layout(pp=2)]
    assert_parity(2, [(layout, ADAM_OF_TWO) for layout in layouts], offload="cpu")


@pytest.mark.full
def test_settings_that_are_passed_on_reach_it_and_change_no_number() -> None:
    small = {"reduce_bucket_size": 1500, "stage3_param_persistence_threshold": 40}
    cases = [(Layout(1, 2, zero=zero), ADAM_OF_TWO) for zero in (1, 2, 3)]
    assert_parity(2, cases, deepspeed={"zero_optimization": small})
    groups = {"zero_optimization": {"sub_group_size": 700, "prefetch_bucket_size": 100, "max_live_parameters": 5000}}
    assert_parity(2, cases[2:], deepspeed=groups)


def both_engines(configs: list[Config]) -> list[list[Measured]]:
    """On a rank: each config under our own store and under DeepSpeed."""
    found = []
    for config in configs:
        ours = copy.deepcopy(config)
        ours.parallel.engine = "fsdp"
        found.append([train([one], steps=4)[0] for one in (ours, config)])
    return found


@pytest.mark.long
def test_in_bf16_the_first_gradients_are_bitwise_those_of_the_other_engine() -> None:
    """Both sum in fp32 what autograd makes in bf16: every micro-batch's, and every rank's."""
    configs = [config_of(layout, Case(2, tied=True)) for layout in STAGES]
    configs += [config_of(layout, Case(2, tied=True), offload="cpu") for layout in STAGES[1:]]
    for config in configs:
        config.precision = "bf16"
    ranks = world.run(both_engines, 2, configs, timeout=200.0, fresh=True)
    for number, config in enumerate(configs):
        ours, theirs = ([rank[number][engine] for rank in ranks] for engine in (0, 1))
        wanted, found = (assemble([rank.gradients for rank in ranks], GRADIENT) for ranks in (ours, theirs))
        for name, value in wanted.items():
            assert torch.equal(found[name], value), f"{config.parallel}: {name}"
        assert theirs[0].trace.losses == pytest.approx(ours[0].trace.losses, rel=1e-3)
        assert theirs[0].trace.norms[0] == pytest.approx(ours[0].trace.norms[0], rel=1e-6)


def conforms() -> dict[str, Any]:
    """On a rank: the conformance suite, run on this engine at every stage."""
    found: dict[str, Any] = {"votes": conformance.agreed_votes(ENGINE)}
    for zero in range(4):
        found[f"live {zero}"] = conformance.moved_through_shards(zero, ENGINE)
        found[f"evaluated {zero}"] = conformance.evaluated(zero, ENGINE)
        found[f"no token {zero}"] = conformance.step_without_a_valid_token(zero, ENGINE)
        found[f"initial {zero}"] = copies(conformance.initial_shards(zero, ENGINE))
        bf16 = small_config(parallel=ParallelConfig(zero=zero, engine=ENGINE), precision="bf16")
        found[f"twice {zero}"] = [conformance.train(bf16, steps=3) for _ in range(2)]
    return found


def copies(shards: list[Shard]) -> list[Shard]:
    return [replace(shard, data=shard.data.clone()) for shard in shards]


def test_the_conformance_suite_holds_at_every_stage() -> None:
    ranks = world.run(conforms, 2, timeout=200.0, fresh=True)
    alone = one_process(small_config(), 0).parameters
    for rank in ranks:
        assert rank["votes"] == [frozenset(), {ControlFlag.STOP}]
    for zero in range(4):
        assert all(rank[f"live {zero}"] for rank in ranks), zero
        assert all(rank[f"no token {zero}"] == (True, 0, True) for rank in ranks), zero
        for rank in ranks:
            evaluation, training = rank[f"evaluated {zero}"]
            assert evaluation == pytest.approx(conformance.reference("adamw").losses[0], rel=1e-5), zero
            assert training == pytest.approx(evaluation, rel=1e-6), zero
            (trace, shards), (trace_again, shards_again) = rank[f"twice {zero}"]
            assert trace == trace_again, zero
            assert all(torch.equal(a.data, b.data) for a, b in zip(shards, shards_again, strict=True)), zero
        for name, value in assemble([rank[f"initial {zero}"] for rank in ranks]).items():
            assert torch.equal(value, alone[name]), f"ZeRO {zero}: {name}"


def variants() -> dict[str, Config]:
    """Users' optimizers, frozen parameters, odd sizes, at the stages that treat them differently."""
    found = {}
    for zero in (1, 2, 3):
        parallel = ParallelConfig(zero=zero, engine=ENGINE)
        config = small_config(parallel=parallel, batch=BatchConfig(size=8, micro_size=2))
        theirs = {"betas": config.optim.betas, "eps": config.optim.eps}
        config.optim = OptimConfig(target="tests.toy:adamw_without_kernels", lr=config.optim.lr, args=theirs)
        found[f"own optimizer, ZeRO {zero}"] = config
        config = small_config(parallel=copy.deepcopy(parallel), batch=BatchConfig(size=8, micro_size=2))
        config.model.target, config.optim.weight_decay = "tests.toy:build_frozen", 0.5
        found[f"frozen, ZeRO {zero}"] = config
        found[f"bf16, frozen, ZeRO {zero}"] = copy.deepcopy(config)
        found[f"bf16, frozen, ZeRO {zero}"].precision = "bf16"
    return found


def frozen_stage() -> Config:
    config = small_config(
        parallel=ParallelConfig(zero=1, pp=2, engine="deepspeed"), batch=BatchConfig(size=8, micro_size=2)
    )
    config.model.target = "tests.toy:build_with_frozen_start"
    return config


@pytest.mark.long
def test_a_stage_that_trains_nothing_goes_through_a_pipeline() -> None:
    """On two data-parallel ranks, in both precisions for which DeepSpeed has a separate optimizer."""
    wanted = one_process(frozen_stage(), STEPS)
    for precision in ("fp32", "bf16"):
        config = frozen_stage()
        config.precision = precision
        ranks = world.run(conformance.train, 4, config, "fsdp", STEPS, timeout=200.0, fresh=True)
        parameters = assemble([shards for _, shards in ranks])
        assert ranks[0][0].losses == pytest.approx(wanted.losses, rel=1e-5 if precision == "fp32" else 2e-2)
        if precision == "fp32":
            for name, value in wanted.parameters.items():
                assert normwise(parameters[name], value) < 1e-4, name


def train_variants() -> dict[str, tuple[Trace, list[Shard]]]:
    return {
        name: conformance.train(config, steps=STEPS, poison=3 if name.startswith("own") else None)
        for name, config in variants().items()
    }


@pytest.mark.long
def test_users_optimizers_and_frozen_parameters_train_as_in_one_process() -> None:
    ranks = world.run(train_variants, 2, timeout=200.0, fresh=True)
    skipping = one_process(small_config(), STEPS, poison=3)
    frozen = one_process(variants()["frozen, ZeRO 1"], STEPS)
    start = one_process(variants()["frozen, ZeRO 1"], 0).parameters
    for name in variants():
        wanted = skipping if name.startswith("own") else frozen
        parameters = assemble([rank[name][1] for rank in ranks])
        if name.startswith("bf16"):
            assert ranks[0][name][0].losses == pytest.approx(wanted.losses, rel=2e-2), name
        else:
            for parameter, value in wanted.parameters.items():
                assert normwise(parameters[parameter], value) < 1e-4, f"{name}: {parameter}"
        if "frozen" in name:
            for parameter in ("layers.0.inner.weight", "layers.0.outer.bias", "head.weight"):
                stored = torch.bfloat16 if name.startswith("bf16") else torch.float32
                assert torch.equal(parameters[parameter], start[parameter].to(stored)), f"{name}: {parameter}"
        assert ranks[0][name][0].skipped == ranks[1][name][0].skipped == wanted.skipped, name


def skipped_step(config: Config) -> tuple[bool, bool, bool]:
    """On a rank: a step that is infinite on the last rank only. Was it left out, and everything else left as it was?"""
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))

    def step(number: int) -> Any:
        rows = global_rows(config, number)[mesh.dp_rank :: layout.dp]
        engine.forward_backward(rows)
        return engine.update(config.optim.lr).read()

    step(1)
    before, state = [shard.data.clone() for shard in engine.shards()], engine.state()
    if mesh.rank == layout.world - 1:
        weight = next(parameter for _, parameter in cut_model(engine).named_parameters() if parameter.numel())
        hook = weight.register_hook(lambda gradient: gradient * math.inf)
    result = step(2)
    if mesh.rank == layout.world - 1:
        hook.remove()
    unchanged = all(torch.equal(a, shard.data) for a, shard in zip(before, engine.shards(), strict=True))
    unchanged &= state == engine.state()
    return result.skipped, unchanged, not step(3).skipped


def cut_model(engine: Any) -> torch.nn.Module:
    return engine._weights[-1].module


def skipped_steps(configs: list[Config]) -> list[tuple[bool, bool, bool]]:
    return [skipped_step(config) for config in configs]


@pytest.mark.long
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any() -> None:
    layouts = [Layout(2), Layout(1, 2, zero=1), Layout(1, 2, zero=2), Layout(tp=2, zero=1), Layout(pp=2)]
    configs = [config_of(layout, Case(2, tied=True)) for layout in layouts]
    configs += [config_of(Layout(1, 2, zero=2), Case(2), offload="cpu")]
    for config in configs[:3]:
        config.precision = "bf16"
    for rank in world.run(skipped_steps, 2, configs, timeout=200.0, fresh=True):
        for config, found in zip(configs, rank, strict=True):
            assert found == (True, True, True), config.parallel


def after_a_step_without(configs: list[Config]) -> list[tuple[list[Shard], list[Shard]]]:
    """On a rank: the gradients of a step whose loss reaches all, and of the next, which leaves the second layer out."""
    found = []
    for config in configs:
        config.model.target = "tests.toy:build_skipping"
        layout = layout_of(config, dist.get_world_size())
        mesh = mesh_over_default_group(layout, world.device(), 60.0)
        engine = cut(config, mesh, batch_plan(config, layout))
        gradients = []
        for shift in (0, 1):
            rows = global_rows(config, 1)[mesh.dp_rank :: layout.dp]
            rows = replace(rows, positions=rows.positions + shift)
            engine.forward_backward(rows)
            gradients.append(engine.gradient_shards())
            engine.update(config.optim.lr)
        found.append((gradients[0], gradients[1]))
    return found


def test_a_parameter_that_a_loss_does_not_reach_has_no_gradient_of_the_step_before() -> None:
    configs = [
        small_config(
            parallel=ParallelConfig(zero=zero, engine=ENGINE, offload=offload), batch=BatchConfig(size=8, micro_size=2)
        )
        for zero in range(4)
        for offload in ("none", "cpu")
    ]
    configs.append(small_config(parallel=ParallelConfig(zero=1, engine=ENGINE), precision="bf16"))
    for rank in world.run(after_a_step_without, 2, configs, timeout=120.0, fresh=True):
        for config, (reached, left_out) in zip(configs, rank, strict=True):
            second = [
                [shard.data for shard in shards if shard.name.startswith("layers.1")] for shards in (reached, left_out)
            ]
            assert all(data.any() for data in second[0] if data.numel() > 100), config.parallel
            assert not any(data.any() for data in second[1]), config.parallel


@pytest.mark.long
def test_compiled_blocks_compute_the_same() -> None:
    """ZeRO 0 to 2; at ZeRO 3 it is refused."""
    cases = [(layout, Case(4, tied=True)) for layout in STAGES[:3]]
    configs = [config_of(layout, case) for layout, case in cases]
    for config in configs:
        config.compile, config.model.num_hidden_layers = True, 2
    plain = one_process(configs[0], STEPS)
    for measured in world.run(train_each, 2, configs, timeout=240.0, fresh=True):
        for config, found in zip(configs, measured, strict=True):
            assert found.trace.losses == pytest.approx(plain.losses, rel=1e-4), config.parallel
            assert found.trace.norms == pytest.approx(plain.norms, rel=1e-3), config.parallel


def bytes_of_masters() -> dict[int, tuple[int, int]]:
    found = {}
    for zero in range(4):
        engine, _ = conformance.build(small_config(parallel=ParallelConfig(zero=zero, engine=ENGINE)))
        shards = engine.shards()
        parameters = sum(shard.data.numel() for shard in shards if shard.kind == PARAMETER)
        found[zero] = parameters, sum(shard.data.numel() for shard in shards if shard.kind == "optim.exp_avg")
    return found


def test_optimizer_state_is_sharded_from_stage_one_on() -> None:
    whole = sum(value.numel() for value in one_process(small_config(), 0).parameters.values())
    ranks = world.run(bytes_of_masters, 2, fresh=True)
    for zero in (1, 2, 3):
        assert [sum(rank[zero][kind] for rank in ranks) for kind in (0, 1)] == [whole, whole]
        assert all(abs(rank[zero][1] - whole / 2) <= 40 for rank in ranks)
    assert [rank[0] for rank in ranks] == [(whole, whole)] * 2


@pytest.mark.long
def test_activations_can_be_recomputed() -> None:
    wanted = expected(True, "adamw")
    modes = [(1, "selective"), (2, "full"), (2, "selective"), (3, "full")]
    configs = [config_of(Layout(1, 2, zero=zero), ADAM_OF_TWO) for zero, _ in modes]
    for config, (_, mode) in zip(configs, modes, strict=True):
        config.activation_checkpointing = mode
    for measured in world.run(train_each, 2, configs, timeout=120.0, fresh=True):
        for found in measured:
            assert found.trace.losses == pytest.approx(wanted.losses, rel=1e-5)
            assert found.trace.norms == pytest.approx(wanted.norms, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [Layout(zero=1), Layout(zero=3), *STAGES[1:]], ids=str)
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_stages_on_gpus_compute_what_one_process_on_a_cpu_computes(layout: Layout, offload: str) -> None:
    if torch.cuda.device_count() < layout.world:
        pytest.skip(f"needs {layout.world} GPUs, there are {torch.cuda.device_count()}")
    wanted = expected(True, "adamw")
    config = config_of(layout, ADAM, offload=offload)
    for measured in world.run(train_each, layout.world, [config], timeout=300.0, device="cuda", fresh=True):
        assert measured[0].trace.losses == pytest.approx(wanted.losses, rel=1e-5)
        assert measured[0].trace.norms == pytest.approx(wanted.norms, rel=1e-5)
