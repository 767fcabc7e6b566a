"""A model in transformers' own modules: killed, and resumed on another layout and on another engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.checkpoint import newest, read_tensors
from stoker.conf.rundir import RunDirectory, read_config
from stoker.models.family import TRANSFORMERS
from stoker.parallel.shards import PARAMETER
from tests.launch.runs import (
    command,
    kill,
    last_step,
    overrides,
    rank_pids,
    started,
    steps_of,
    train_here,
    wait_until,
    wait_until_gone,
)
from tests.models.families import write_family

STEPS = 14
RUN = [f"steps={STEPS}", "checkpoint.every=2", "tracker=none", "optim.lr=1e-3", "optim.eps=1e-5"]
LAYOUTS = [
    ["parallel.zero=3"],
    ["parallel.tp=2", "parallel.zero=1", "parallel.sequence_parallel=false"],
    ["parallel.engine=deepspeed", "parallel.zero=2"],
]


@pytest.mark.long
def test_it_is_killed_and_resumed_on_another_layout_and_another_engine(home: Path) -> None:
    write_family(home / "model", "gemma3")
    own = [f"model.init_from={home / 'model'}", "model.native=false", *RUN]
    # The shape is the folder's.
    words = [word for word in overrides(home / "r", home / "text", *own) if not word.startswith(SHAPE)]
    reference, run = home / "undisturbed", home / "killed"

    def of(folder: Path, layout: list[str]) -> list[str]:
        changed = {word.split("=")[0] for word in layout}
        return [f"run.dir={folder}", *layout, *(w for w in words if w.split("=")[0] not in {"run.dir", *changed})]

    train_here(home, of(reference, ["parallel.zero=0"]))
    for number, layout in enumerate(LAYOUTS, start=1):
        with started(home, command("train", *of(run, layout))) as process:
            if number < len(LAYOUTS):
                wait_until(lambda number=number: last_step(run) >= 4 * number, process)  # type: ignore[misc]
                for pid in [process.pid, *rank_pids(run).values()]:
                    kill(pid)
            output, _ = process.communicate(timeout=120)
            wait_until_gone(home, 20.0)
    assert process.returncode == 0, output
    assert read_config(RunDirectory(run)).model.target == TRANSFORMERS
    found, expected = steps_of(run), steps_of(reference)
    assert [step[0] for step in found] == list(range(1, STEPS + 1))
    for here, there in zip(found, expected, strict=True):
        assert here[2:4] == pytest.approx(there[2:4], rel=1e-5) and here[5] == there[5]
    ours, theirs = (
        dict(read_tensors(newest(RunDirectory(folder).checkpoints)[0], PARAMETER)) for folder in (run, reference)
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert float((ours[name] - value).norm() / value.norm()) < 1e-4, name


SHAPE = ("model.hidden_size", "model.num_", "model.intermediate_size")
