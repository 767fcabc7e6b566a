"""The state of every rule moves to another layout and engine, and the same layout continues bitwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stoker.conf.schema import BatchConfig, Config, OptimConfig
from stoker.parallel.layout import Layout
from stoker.parallel.shards import Shard, whole
from tests import world
from tests.extent import some
from tests.parallel.conformance import build, train
from tests.parallel.parity import OPTIMIZERS
from tests.parallel.reference import assemble, global_rows, normwise, small_config

State = dict[tuple[str, str], Tensor]


def config_of(optim: OptimConfig, layout: Layout) -> Config:
    config = small_config(batch=BatchConfig(size=8, micro_size=2), optim=replace(optim))
    config.parallel.zero, config.parallel.tp, config.parallel.pp = layout.zero, layout.tp, layout.pp
    config.parallel.dp_replicate = layout.dp_replicate if layout.zero else None
    config.parallel.engine = layout.engine
    return config


def resumed(config: Config, state: State, scalars: dict[str, float], done: int, steps: int) -> list[Shard]:
    """On a rank: continue to `steps` from the `state` after step `done`."""
    engine, mesh = build(config)
    for shard in engine.shards():
        shard.data.copy_(state[shard.name, shard.kind][shard.chunk.within(whole(shard.shape))])
    engine.load_state(scalars)
    engine.shards_written()
    for step in range(done + 1, steps + 1):
        engine.forward_backward(global_rows(config, step)[mesh.dp_rank :: mesh.layout.dp])
        engine.update(config.optim.lr).read()
    return [replace(shard, data=shard.data.clone()) for shard in engine.shards()]


def state_of(ranks: list[list[Shard]]) -> State:
    kinds = {shard.kind for shards in ranks for shard in shards}
    return {(name, kind): value for kind in kinds for name, value in assemble(ranks, kind).items()}


RULES = OPTIMIZERS | {
    "a user's norms": OptimConfig(target="tests.parallel.optimizers:DeclaredLamb", lr=1e-3),
    "mixed": OptimConfig(
        lr=1e-3, eps=1e-6, groups=[{"pattern": "layers.0.*", "name": "lamb"}, {"role": "matrix", "name": "muon"}]
    ),
}
FROM, ONTO = Layout(1, 2, zero=2), Layout(tp=2)


@pytest.mark.long
@pytest.mark.parametrize("rule", some(list(RULES), 2))
def test_a_run_resumes_on_another_layout_and_bitwise_on_its_own(rule: str) -> None:
    there, here = config_of(RULES[rule], FROM), config_of(RULES[rule], ONTO)
    unbroken = state_of([shards for _, shards in world.run(train, 2, there, "fsdp", 4)])
    half = state_of([shards for _, shards in world.run(train, 2, there, "fsdp", 2)])
    scalars = {"step": 2.0}
    same = state_of(world.run(resumed, 2, there, half, scalars, 2, 4))
    other = state_of(world.run(resumed, 2, here, half, scalars, 2, 4))
    assert same.keys() == other.keys() == unbroken.keys()
    for key, value in unbroken.items():
        assert torch.equal(same[key], value), key
        assert normwise(other[key], value) < 1e-5, key
