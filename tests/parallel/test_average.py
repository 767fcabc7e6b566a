"""The moving average of the weights: one process's on every layout, through resumes, skipped steps and evaluations."""

from __future__ import annotations

import pytest
import torch

from stoker.conf.schema import Config
from stoker.parallel.average import Average
from stoker.parallel.layout import Layout
from stoker.parallel.shards import PARAMETER, Shard
from tests import world
from tests.parallel.conformance import build
from tests.parallel.reference import assemble, global_rows, normwise, small_config

KIND = "optim.ema"


def config_of(layout: Layout) -> Config:
    config = small_config()
    config.optim.lr, config.optim.eps, config.optim.ema = 1e-3, 1e-6, 0.2
    config.parallel.zero, config.parallel.tp, config.parallel.engine = layout.zero, layout.tp, layout.engine
    return config


def trained(config: Config, steps: int) -> tuple[list[list[Shard]], tuple[float, float], list[Shard]]:
    """On a rank: its parameters after every step, the losses of weights and average at the end, its shards."""
    engine, mesh = build(config)
    history = []
    for step in range(1, steps + 1):
        engine.forward_backward(global_rows(config, step)[mesh.dp_rank :: mesh.layout.dp])
        engine.update(config.optim.lr).read()
        history.append([Shard(**{**vars(s), "data": s.data.clone()}) for s in engine.shards() if s.kind == PARAMETER])
    before = [shard.data.clone() for shard in engine.shards()]
    rows = global_rows(config, 1)[mesh.dp_rank :: mesh.layout.dp]
    own = mesh.all_reduce(engine.evaluate(rows)).tolist()
    with engine.averaged():
        averaged = mesh.all_reduce(engine.evaluate(rows)).tolist()
    assert all(torch.equal(a, shard.data) for a, shard in zip(before, engine.shards(), strict=True))
    assert engine.state()["ema_updates"] == steps
    return history, (own[0] / own[1], averaged[0] / averaged[1]), engine.shards()


@pytest.mark.parametrize("layout", [Layout(1, 2, zero=2), Layout(tp=2)], ids=str)
def test_it_is_one_processs_average_of_its_weights(layout: Layout) -> None:
    ((history, losses, shards),) = world.run(trained, 1, config_of(Layout()), 4)
    wanted = assemble([history[0]])
    for t, after in enumerate(history[1:], 2):
        decay = min(0.2, (t - 1) / (t + 9))
        wanted = {name: decay * wanted[name] + (1 - decay) * value for name, value in assemble([after]).items()}
    for name, value in assemble([shards], KIND).items():
        assert normwise(value, wanted[name]) < 1e-6, name
    ranks = world.run(trained, layout.world, config_of(layout), 4)
    for name, value in assemble([found for _, _, found in ranks], KIND).items():
        assert normwise(value, wanted[name]) < 1e-4, name
    assert losses[0] != losses[1] and ranks[0][1] == pytest.approx(losses, rel=1e-5)


def test_a_step_that_is_left_out_changes_nothing() -> None:
    part = torch.ones(3)
    average = Average(0.9, {"w": part, "empty": torch.empty(0)})
    average.update(torch.zeros(()))
    part.fill_(5.0)
    average.update(torch.ones(()))
    ((name, key, value),) = average.tensors()
    assert (name, key) == ("w", "ema") and torch.equal(value, torch.ones(3))
    assert average.scalars() == {"ema_updates": 1.0}
