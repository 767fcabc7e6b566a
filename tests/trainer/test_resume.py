"""A checkpoint of any layout continues on any other: the losses are those of one process that was never stopped."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from stoker.checkpoint import Checkpoints, resume
from stoker.conf.schema import Config
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import Shard
from stoker.trainer.parallelize import cut
from tests import world
from tests.extent import some
from tests.parallel.parity import Case
from tests.parallel.reference import Trace, assemble, global_rows, normwise, one_process

HALF = 5
LAYOUTS: list[tuple[Layout, str]] = [  # with the schedule of the pipeline
    (Layout(), "1f1b"),
    (Layout(2), "1f1b"),
    (Layout(1, 2, zero=1), "1f1b"),
    (Layout(tp=2), "1f1b"),
    (Layout(1, 2, zero=3), "1f1b"),
    (Layout(pp=2), "interleaved"),
    (Layout(2, 2, zero=2), "1f1b"),
    (Layout(1, 2, 2, 1, 3), "1f1b"),
    (Layout(1, 2, 1, 2, 2), "1f1b"),
    (Layout(1, 1, 2, 2), "gpipe"),
    (Layout(tp=4), "1f1b"),
]


def config_of(number: int, optimizer: str) -> Config:
    layout, schedule = LAYOUTS[number]
    return Case(4, schedule, tied=True, optimizer=optimizer).config(layout)


def half(config: Config, directory: Path) -> tuple[list[tuple[float, float]], list[Shard]]:
    """On a rank: resume from `directory`, train for HALF steps, and save."""
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    state = resume(directory, engine.shards(), mesh.all_gather_text, mesh.rank)
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
    return one_process(config_of(0, optimizer), 2 * HALF)


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "optimizer"), some([*((n, "adamw") for n in range(len(LAYOUTS))), (4, "sgd"), (8, "sgd")], 2)
)
def test_a_run_resumes_from_any_layout_on_any_other(tmp_path: Path, number: int, optimizer: str) -> None:
    """Each layout hands over to three others, so that all of them give and take."""
    trace = expected(optimizer)
    world.run(half, LAYOUTS[number][0].world, config_of(number, optimizer), tmp_path / "first")
    for away in (1, 3, 7):
        heir = (number + away) % len(LAYOUTS)
        pair = f"{LAYOUTS[number]} -> {LAYOUTS[heir]}"
        directory = tmp_path / str(heir)
        directory.mkdir()
        (directory / "step-00000005").symlink_to(tmp_path / "first" / "step-00000005")
        results = world.run(half, LAYOUTS[heir][0].world, config_of(heir, optimizer), directory)
        losses, norms = zip(*results[0][0], strict=True)
        assert losses == pytest.approx(trace.losses[HALF:], rel=1e-5), pair
        assert norms == pytest.approx(trace.norms[HALF:], rel=1e-5), pair
        parameters = assemble([shards for _, shards in results])
        for name, value in trace.parameters.items():
            tolerance = 1e-6 if optimizer == "sgd" else 1e-4
            assert normwise(parameters[name], value) < tolerance, f"{pair}: {name}"
