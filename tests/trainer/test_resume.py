"""A checkpoint of any layout continues on any other: the losses are those of one process that was never stopped."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoint import Checkpoints, resume
from conf.schema import BatchConfig, Config, OptimConfig, ParallelConfig
from parallel.layout import batch_plan, layout_of
from parallel.mesh import mesh_over_default_group
from parallel.shards import Shard
from tests import world
from tests.parallel.reference import Trace, assemble, global_rows, normwise, one_process, small_config
from trainer.cut import cut

HALF = 5
Layout = tuple[int, int, int | None]  # ranks, ZeRO stage, replicas
LAYOUTS: list[Layout] = [(1, 0, None), (2, 0, None), (2, 1, None), (2, 3, None), (4, 2, 2), (4, 3, None)]


def config_of(layout: Layout, optimizer: str) -> Config:
    config = small_config(parallel=ParallelConfig(zero=layout[1], replicas=layout[2]))
    config.batch = BatchConfig(rows=8, micro=1)
    if optimizer == "sgd":
        config.optim = OptimConfig(name="sgd", lr=0.5, momentum=0.9)
    return config


def half(config: Config, directory: Path) -> tuple[list[tuple[float, float]], list[Shard]]:
    """On a rank: go on from what is in `directory`, train for HALF steps, and save."""
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    state = resume(directory, engine.shards(), mesh.exchange, mesh.rank)
    done = 0
    if state is not None:
        done = state["step"]
        engine.load_state(state["engine"])
        engine.shards_written()
    saves = Checkpoints(directory, rank=mesh.rank, world=layout.world, attempt=done + 1, keep=3)
    found = []
    for step in range(done + 1, done + HALF + 1):
        engine.forward_backward(global_rows(config, step)[mesh.dp_rank :: layout.dp])
        result = engine.update(config.optim.lr).read()
        found.append((result.loss, result.grad_norm))
    saves.save(done + HALF, engine.shards(), {"step": done + HALF, "engine": engine.state()})
    assert [report.error for report in saves.wait()] == [None]
    return found, engine.shards()


@cache
def expected(optimizer: str) -> Trace:
    return one_process(config_of(LAYOUTS[0], optimizer), 2 * HALF)


@pytest.mark.parametrize(
    ("number", "optimizer"), [*((n, "adamw") for n in range(len(LAYOUTS))), (3, "sgd"), (4, "sgd")]
)
def test_a_run_goes_on_from_any_layout_on_any_other(tmp_path: Path, number: int, optimizer: str) -> None:
    """Each layout hands over to three others, so that all six give and take."""
    first = LAYOUTS[number]
    trace = expected(optimizer)
    world.run(half, first[0], config_of(first, optimizer), tmp_path / "first")
    for second in (LAYOUTS[(number + away) % len(LAYOUTS)] for away in (1, 2, 4)):
        directory = tmp_path / "-".join(map(str, second))
        directory.mkdir()
        (directory / "step-00000005").symlink_to(tmp_path / "first" / "step-00000005")
        results = world.run(half, second[0], config_of(second, optimizer), directory)
        losses, norms = zip(*results[0][0], strict=True)
        assert losses == pytest.approx(trace.losses[HALF:], rel=1e-5), (first, second)
        assert norms == pytest.approx(trace.norms[HALF:], rel=1e-5), (first, second)
        parameters = assemble([shards for _, shards in results])
        for name, value in trace.parameters.items():
            tolerance = 1e-6 if optimizer == "sgd" else 1e-4
            assert normwise(parameters[name], value) < tolerance, (first, second, name)
