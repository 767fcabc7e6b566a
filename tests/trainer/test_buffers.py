"""Persistent buffers in the checkpoints of whole runs."""

from __future__ import annotations

from pathlib import Path

import torch

from stoker.checkpoint import read_tensors
from stoker.parallel.shards import BUFFER
from tests import world
from tests.launch.runs import overrides, steps_of, write_text


def trained(words: list[list[str]]) -> None:
    import torch.distributed as dist

    import stoker

    dist.destroy_process_group()
    for each in words:
        stoker.run(each)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_a_run_with_persistent_buffers_resumes_where_it_was(tmp_path: Path) -> None:
    """What each forward computes depends on how many came before it."""

    def words(name: str, steps: int) -> list[str]:
        return overrides(
            tmp_path / name, write_text(tmp_path / "text"), f"steps={steps}", "schedule.total_steps=4",
            "model.target=tests.parallel.odd_models:Remembering", f"data.cache={tmp_path / 'cache'}", "parallel.zero=0",
        )  # fmt: skip

    world.run(trained, 1, [words("once", 4), words("twice", 2), words("twice", 4)])
    assert steps_of(tmp_path / "once") == steps_of(tmp_path / "twice")
    (newest,) = (tmp_path / "twice" / "checkpoints").glob("step-*4")
    stored = dict(read_tensors(newest, BUFFER))
    assert set(stored) == {f"layers.{n}.{name}" for n in (0, 1) for name in ("calls", "seen")}
    assert stored["layers.0.calls"].dtype == torch.int64 and stored["layers.0.calls"] == 4 * 4
