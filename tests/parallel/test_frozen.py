"""Frozen parameters: their bytes, their values, and what is computed with them, in fewer bits than masters have."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from stoker.conf.schema import AdapterConfig, Config
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.normal import normal
from stoker.parallel.registry import Registry
from stoker.parallel.shards import GRADIENT, PARAMETER
from stoker.trainer import parallelize
from stoker.trainer.parallelize import cut
from tests import world
from tests.extent import some
from tests.parallel.parity import Case, Measured, train
from tests.parallel.reference import assemble, global_rows, initial_value, normwise

SLACK = 1 << 16  # bytes of a rank for buffers, scalars and rows of the shares that do not divide
TRAINED_BYTES = 4 + 4 + 8  # of a trained element: master, gradient, two moments
FREEZE = ["embedding", "*.mlp", "*.attention.q"]


def config_of(
    layout: Layout, precision: str = "bf16", freeze: bool = False, engine: str = "fsdp", **changes: object
) -> Config:
    """A model that is mostly frozen, by an adapter or by name."""
    config = Case(4, schedule="gpipe").config(layout, layers=2)
    config.precision, config.parallel.engine = precision, engine
    config.model.hidden_size, config.model.intermediate_size = 96, 200
    if engine == "deepspeed" and layout.zero == 3:  # it keeps small parameters whole, and here all are
        config.parallel.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    if freeze:
        config.model.freeze = list(FREEZE)
    else:
        config.adapter = AdapterConfig("lora", rank=2, target_modules=["q", "down"])
    for key, value in changes.items():
        setattr(config.parallel, key, value)
    return config


@dataclass(frozen=True)
class Held:
    """Of a rank between two steps."""

    bytes: int  # of all tensors
    frozen: int  # elements of frozen shards
    trained: int  # of trained ones
    optimizer: int  # bytes
    dtypes: tuple[torch.dtype, ...]  # of frozen shards


def held(config: Config) -> Held:
    """On a rank: what is held after two steps."""
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    normal(1, key=0)  # it keeps its tables
    gc.collect()
    before = traced()
    engine = cut(config, mesh, batch_plan(config, layout))
    for step in (1, 2):
        engine.forward_backward(global_rows(config, step)[mesh.dp_rank :: layout.dp], 0)
        engine.update(1e-3).read()
    gc.collect()
    found = traced() - before
    trained = {shard.name for shard in engine.shards() if shard.kind.startswith("optim.")}
    counts: Counter[bool] = Counter()
    for shard in engine.shards():
        if shard.kind == PARAMETER:
            counts[shard.name in trained] += shard.data.numel()
    optimizer = sum(shard.data.nbytes for shard in engine.shards() if shard.kind.startswith("optim."))
    dtypes = {s.data.dtype for s in engine.shards() if s.kind == PARAMETER and s.name not in trained}
    return Held(found, counts[False], counts[True], optimizer, tuple(dtypes))


def traced() -> int:
    """Bytes of all tensors of this process, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


BYTES = [
    (Layout(), {}),
    (Layout(1, 2, zero=3), {}),
    (Layout(2), {"freeze": True}),
    (Layout(1, 2, zero=1), {}),
    (Layout(1, 2, zero=2), {"freeze": True}),
    (Layout(tp=2), {}),
    (Layout(pp=2), {}),
    (Layout(), {"offload": "cpu"}),
    (Layout(2, 2, zero=3), {}),
    (Layout(1, 2, zero=2), {"engine": "deepspeed"}),
    (Layout(1, 2, zero=3), {"engine": "deepspeed"}),
    (Layout(1, 2, zero=1), {"engine": "deepspeed", "freeze": True}),
    (Layout(pp=2, zero=1), {"engine": "deepspeed"}),
]


def assert_bytes(layout: Layout, changes: dict) -> None:
    config = config_of(layout, **changes)
    own = sum(rank.frozen for rank in world.run(elements, 1, config_of(Layout(), freeze=config.model.freeze != [])))
    deepspeed = config.parallel.engine == "deepspeed"
    shards = layout.dp_shard if layout.zero == 3 or not deepspeed else 1  # DeepSpeed shards weights at ZeRO 3 only
    for rank in world.run(held, layout.world, config, fresh=True, timeout=200.0):
        assert rank.dtypes == (torch.bfloat16,), changes
        assert rank.optimizer == 8 * rank.trained
        assert rank.frozen <= own / shards + SLACK / 2
        copies = 2 * rank.trained * (layout.dp_shard if layout.zero else 1)
        extra = 4 * rank.trained * 3 if deepspeed else 0  # its flat buffers, and buckets of gradients
        assert rank.bytes <= 2 * rank.frozen + TRAINED_BYTES * rank.trained + copies + extra + SLACK, (layout, changes)


def elements(config: Config) -> Held:
    """On a rank: the same without a step."""
    layout = layout_of(config, dist.get_world_size())
    engine = cut(config, mesh_over_default_group(layout, world.device(), 60.0), batch_plan(config, layout))
    trained = {shard.name for shard in engine.shards() if shard.kind.startswith("optim.")}
    still = [s.data.numel() for s in engine.shards() if s.kind == PARAMETER and s.name not in trained]
    return Held(0, sum(still), 0, 0, ())


@pytest.mark.parametrize(("layout", "changes"), BYTES[:2], ids=str)
def test_a_frozen_element_takes_two_bytes_and_nothing_else(layout: Layout, changes: dict) -> None:
    assert_bytes(layout, changes)


@pytest.mark.long
@pytest.mark.parametrize(("layout", "changes"), some(BYTES[2:], 2), ids=str)
def test_a_frozen_element_takes_two_bytes_in_every_strategy(layout: Layout, changes: dict) -> None:
    assert_bytes(layout, changes)


def with_masters(configs: list[Config], steps: int) -> list[Measured]:
    """On a rank: `train` as it was with fp32 masters of frozen parameters, which `fully_shard` rounds where it gathers
    them."""
    stored: Callable[..., Registry] = parallelize.store_frozen
    try:
        parallelize.store_frozen = lambda stages, full, registry, dtype: registry
        return train(configs, steps)
    finally:
        parallelize.store_frozen = stored


@pytest.mark.parametrize("freeze", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_run_is_to_the_last_bit_that_with_masters_and_the_base_is_rounded_once(freeze: bool) -> None:
    layout = Layout(1, 2, zero=3)
    configs = [config_of(layout, precision, freeze) for precision in ("bf16", "fp16")]
    found = world.run(train, 2, configs, 4, timeout=200.0)
    before = world.run(with_masters, 2, configs, 4, timeout=200.0)
    for now, then, config in zip(zip(*found, strict=True), zip(*before, strict=True), configs, strict=True):
        assert now[0].trace.losses == then[0].trace.losses and now[0].trace.norms == then[0].trace.norms
        parameters, kept = (assemble([rank.parameters for rank in ranks]) for ranks in (now, then))
        trained = {shard.name for rank in now for shard in rank.gradients}
        assert 0 < len(trained) < len(parameters)
        for name, value in parameters.items():
            if name in trained:
                assert torch.equal(value, kept[name]), name
            else:
                assert torch.equal(value, initial_value(config, name, tuple(value.shape)).to(value.dtype)), name
                assert torch.equal(value, kept[name].to(value.dtype)), name


def first_step(config: Config, every: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """On one rank: the loss of a step, and the gradients of adapters. `every` parameter is trained."""
    build = parallelize.part_builder

    def unfrozen(config: Config) -> Callable:
        return lambda part: build(config)(part).requires_grad_()

    mesh = mesh_over_default_group(Layout(), world.device(), 60.0)
    try:
        parallelize.part_builder = unfrozen if every else build
        engine = cut(config, mesh, batch_plan(config, Layout()))
    finally:
        parallelize.part_builder = build
    for shard in engine.shards():
        if shard.name.endswith("lora.B"):  # gradients of A are zero beside a B of zeros
            shard.data.copy_(initial_value(config, shard.name, tuple(shard.shape)))
    engine.shards_written()
    engine.forward_backward(global_rows(config, 1), 0)
    gradients = assemble([engine.gradient_shards()], GRADIENT)
    return engine.update(0.0).read().loss, {name: value for name, value in gradients.items() if "lora" in name}


def test_beside_copies_of_masters_one_rank_computes_the_same_to_the_last_bit() -> None:
    (loss, gradients), (wanted, expected) = (
        world.run(first_step, 1, config_of(Layout()), every)[0] for every in (False, True)
    )
    assert loss == wanted and gradients.keys() == expected.keys() and len(gradients) == 8
    for name, value in gradients.items():
        assert value.any() and torch.equal(value, expected[name]), name


@pytest.mark.long
def test_modules_that_compute_in_fp32_keep_their_frozen_weights_in_fp32() -> None:
    for layout in (Layout(), Layout(1, 2, zero=3)):
        config = config_of(layout, freeze=True)
        config.fp32_modules = ["layers.*.mlp"]
        measured = [rank[0] for rank in world.run(train, layout.world, [config], 2, timeout=100.0)]
        for name, value in assemble([rank.parameters for rank in measured]).items():
            frozen = name.startswith("embedding") or ".mlp." in name or ".attention.q." in name
            wanted = torch.float32 if ".mlp." in name or not frozen else torch.bfloat16
            assert value.dtype == wanted, name


@pytest.mark.long
def test_every_layout_computes_with_the_rounded_base_what_one_rank_does() -> None:
    """In bf16: rounding of activations differs between layouts, that of the base does not."""
    wanted = world.run(train, 1, [config_of(Layout())], 4, timeout=100.0)[0][0]
    for layout in (Layout(2), Layout(1, 2, zero=2), Layout(tp=2), Layout(pp=2)):
        found = [rank[0] for rank in world.run(train, 2, [config_of(layout)], 4, timeout=100.0)]
        assert found[0].trace.losses == pytest.approx(wanted.trace.losses, rel=2e-3), layout
        parameters, trained = assemble([rank.parameters for rank in found]), {s.name for s in wanted.gradients}
        for name, value in assemble([wanted.parameters]).items():
            same = torch.equal(parameters[name], value)
            assert same if name not in trained else normwise(parameters[name], value) < 0.3, f"{layout}: {name}"
