"""Buffers have values before the first step; persistent ones are part of a run's state on all engines and layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from stoker.conf.schema import BatchConfig, Config, ModelConfig
from stoker.models.family import build_on_meta
from stoker.parallel.batch import IGNORE_INDEX
from stoker.parallel.buffers import fill_buffers
from stoker.parallel.engine import Engine
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import Mesh, mesh_over_default_group
from stoker.parallel.model import whole_model
from stoker.parallel.registry import whole_registry
from stoker.parallel.sharding import materialise
from stoker.parallel.shards import BUFFER, Shard
from stoker.trainer.parallelize import cut
from tests import world
from tests.parallel.reference import VOCABULARY, assemble, global_rows, small_config

LAYOUTS = [Layout(2), *(Layout(1, 2, zero=zero) for zero in (1, 2, 3)), Layout(tp=2), Layout(pp=2)]
OF_DEEPSPEED = [*(Layout(1, 2, zero=zero, engine="deepspeed") for zero in (1, 2, 3)), Layout(2, engine="deepspeed")]


def config_of(layout: Layout, model: str = "Remembering", precision: str = "bf16") -> Config:
    config = small_config(batch=BatchConfig(size=8, micro_size=2), precision=precision)
    config.model = ModelConfig(
        target=f"tests.parallel.odd_models:{model}", vocab_size=VOCABULARY, hidden_size=18, num_hidden_layers=2
    )
    wanted = config.parallel
    wanted.tp, wanted.pp, wanted.zero, wanted.engine = layout.tp, layout.pp, layout.zero, layout.engine
    wanted.sequence = False
    return config


def build(config: Config) -> tuple[Engine, Mesh]:
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    return cut(config, mesh, batch_plan(config, layout)), mesh


def step(engine: Engine, mesh: Mesh, config: Config, number: int) -> float:
    engine.forward_backward(global_rows(config, number)[mesh.dp_rank :: mesh.layout.dp])
    return engine.update(1e-2).read().loss


def copies(engine: Engine) -> list[Shard]:
    return [replace(shard, data=shard.data.clone()) for shard in engine.shards()]


def resumed(configs: list[Config]) -> list[tuple[list[float], list[float], list[Shard], set[torch.dtype]]]:
    """On a rank, for each config: losses of steps 3 and 4, the same after a resume, and the shards of buffers."""
    found = []
    for config in configs:
        engine, mesh = build(config)
        for number in (1, 2):
            step(engine, mesh, config, number)
        shards, state = copies(engine), engine.state()
        engine.evaluate(global_rows(config, 9)[mesh.dp_rank :: mesh.layout.dp])  # changes nothing
        went_on = [step(engine, mesh, config, number) for number in (3, 4)]
        again, mesh = build(config)
        for shard, stored in zip(again.shards(), shards, strict=True):
            assert (shard.name, shard.kind, shard.chunk) == (stored.name, stored.kind, stored.chunk)
            shard.data.copy_(stored.data)
        again.load_state(state)
        again.shards_written()
        after = [step(again, mesh, config, number) for number in (3, 4)]
        buffers = [shard for shard in shards if shard.kind == BUFFER]
        found.append((went_on, after, buffers, {shard.data.dtype for shard in buffers}))
    return found


@pytest.mark.long
@pytest.mark.parametrize("layouts", [LAYOUTS, OF_DEEPSPEED], ids=["fsdp", "deepspeed"])
def test_persistent_buffers_are_resumed_and_others_are_not_stored(layouts: list[Layout]) -> None:
    ranks = world.run(
        resumed, 2, [config_of(layout) for layout in layouts], fresh=layouts is OF_DEEPSPEED, timeout=300.0
    )
    for number, layout in enumerate(layouts):
        of_ranks = [rank[number] for rank in ranks]
        for went_on, after, _, dtypes in of_ranks:
            assert went_on == after, layout
            assert dtypes == {torch.int64, torch.float32}, layout
        stored = assemble([buffers for _, _, buffers, _ in of_ranks], BUFFER)
        assert set(stored) == {f"layers.{n}.{name}" for n in (0, 1) for name in ("calls", "seen")}
        forwards = 2 * 8 // layout.dp // 2  # two steps of micro-batches of two sequences
        assert all(int(stored[f"layers.{n}.calls"]) == forwards for n in (0, 1)), layout


def built_by(name: str) -> nn.Module:
    model = build_on_meta(config_of(Layout(), name).model, whole_model(2))
    materialise(model, torch.device("cpu"))
    return model


def test_buffers_that_get_no_value_are_refused_by_name() -> None:
    model = built_by("Forgetful")
    with pytest.raises(ValueError, match=r"Forgetful\.rebuild_buffers\(\) leaves (.*) uninitialised") as error:
        fill_buffers(model, whole_registry(model))
    assert "layers.0.seen, layers.0.table, layers.1.calls and 2 more" in str(error.value)
    sound = built_by("Remembering")
    fill_buffers(sound, whole_registry(sound))
    assert sound.layers["0"].table.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.bfloat16])
def test_a_buffer_may_get_any_value_in_any_dtype(dtype: torch.dtype) -> None:
    """The value of an uninitialised one too, and through `.data`."""

    class Model(nn.Module):
        def __init__(self, through_data: bool) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(3, dtype=dtype, device="meta"))
            self.through_data = through_data

        def rebuild_buffers(self) -> None:
            mask: Tensor = self.mask  # type: ignore[assignment]
            if self.through_data:
                mask.data.fill_(0)
            else:
                mask.fill_(1)

    for through_data in (False, True):
        model = Model(through_data)
        materialise(model, torch.device("cpu"))
        fill_buffers(model, whole_registry(model))
        assert model.mask.eq(0 if through_data else 1).all()  # type: ignore[union-attr]


def averaging() -> tuple[list[bool], list[Shard], list[Shard]]:
    config = config_of(Layout(2), "Averaging", "fp32")
    engine, mesh = build(config)
    differed = []
    for number in (1, 2):
        engine.forward_backward(global_rows(config, number)[mesh.dp_rank :: mesh.layout.dp])
        differed.append(engine.update(1e-2).read().unequal_buffers)
    before = copies(engine)
    rows = global_rows(config, 3)[mesh.dp_rank :: mesh.layout.dp]
    rows.labels.fill_(IGNORE_INDEX)
    engine.forward_backward(rows)
    assert engine.update(1e-2).read().skipped
    return differed, before, copies(engine)


def test_ranks_with_different_values_take_those_of_the_first_and_report_it() -> None:
    ranks = world.run(averaging, 2)
    for differed, before, after in ranks:
        assert differed == [True, True]
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one.data, other.data), f"{one.kind}/{one.name} changed in a step that was left out"
    assert assemble([before for _, before, _ in ranks], BUFFER)["mean"].any()


def refused_over_stages() -> str:
    with pytest.raises(ValueError) as error:
        build(config_of(Layout(pp=2), "CountingAtTheTop"))
    return str(error.value)


def test_a_buffer_of_several_stages_is_refused() -> None:
    for message in world.run(refused_over_stages, 2):
        assert "buffer calls is persistent and in several pipeline stages" in message and "parallel.pp=1" in message
