"""What a user's model does wrong over tensor-parallel ranks is found before the first step; widths are its own."""

from __future__ import annotations

import pytest

from stoker.conf.schema import Config
from stoker.parallel.layout import Layout
from tests import world
from tests.parallel.odd_models import LAYERS
from tests.parallel.reference import assemble, normwise, one_process
from tests.parallel.test_buffers import build, config_of
from tests.parallel.test_conformance import assert_same, train

WRONG = {
    "never left": "a tensor-parallel region is entered (CopyToTensorParallel) and never left",
    "never entered": "used inside a tensor-parallel region",
    "norm inside": "layers.1.inside.weight is used inside a tensor-parallel region",
    "entered twice": "and never left, or entered twice",
    "not summed": "is cut over tensor-parallel ranks, but what it computes is used without being summed",
}


def config_with(layers: str, layout: Layout, sequence: bool = False) -> Config:
    config = config_of(layout, "OfLayers", "fp32")
    config.model.args = {"layers": layers}
    config.parallel.sequence_parallel = sequence
    return config


def refusals(sequence: bool) -> dict[str, str]:
    found = {}
    for layers in LAYERS:
        try:
            build(config_with(layers, Layout(tp=2), sequence))
        except ValueError as error:
            found[layers] = str(error)
    return found


def test_regions_that_are_left_open_are_refused_and_the_sound_one_is_not() -> None:
    for found in world.run(refusals, 2, False):
        assert found.keys() == WRONG.keys()
        for layers, message in WRONG.items():
            assert message in found[layers] and "parallel.tp=1 works" in found[layers], found[layers]


def test_with_shared_tokens_they_are_refused_too() -> None:
    for found in world.run(refusals, 2, True):
        assert found.keys() == WRONG.keys()
        assert all("parallel.tp=1 works" in message for message in found.values())


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(1, 1, 2, 2)], ids=str)
def test_a_model_of_another_width_than_the_configs_runs_in_a_pipeline(layout: Layout) -> None:
    config, alone = config_of(layout, "Wide", "fp32"), config_of(Layout(), "Wide", "fp32")
    for each in (config, alone):
        each.model.args, each.model.num_hidden_layers = {"widths": [18, 10, 26, 18]}, 3
    config.parallel.sequence_parallel = layout.tp > 1
    results = world.run(train, layout.world, config, "fsdp", 4)
    expected = one_process(alone, 4)
    assert_same(results[0][0], expected, assemble([shards for _, shards in results]), 1e-4)


def without_gradient(configs: list[Config]) -> list[list[str]]:
    from tests.parallel.reference import global_rows

    found = []
    for config in configs:
        engine, mesh = build(config)
        engine.forward_backward(global_rows(config, 1)[mesh.dp_rank :: mesh.layout.dp])
        found.append(engine.without_gradient())
    return found


def test_parameters_that_no_loss_reaches_are_known_on_every_layout() -> None:
    layouts = [Layout(2), Layout(1, 2, zero=1), Layout(1, 2, zero=3), Layout(tp=2)]
    dead = [f"layers.1.{name}" for name in ("inner.bias", "inner.weight", "norm.weight", "outer.bias", "outer.weight")]
    configs = [config_of(layout, "Deaf", "fp32") for layout in layouts]
    sound = config_of(Layout(1, 2, zero=3), "Remembering", "fp32")
    for found in world.run(without_gradient, 2, [*configs, sound]):
        assert found == [dead] * len(layouts) + [[]]


def test_the_first_gradient_is_not_zero_where_a_model_trains() -> None:
    zeroed = config_of(Layout(), "Zeroed", "fp32")
    ((found,),) = world.run(without_gradient, 1, [zeroed])
    assert "head.weight" in found and normwise is not None
