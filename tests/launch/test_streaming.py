"""`stoker train data.mode=streaming`: to the end of the data, over kills and on other layouts, the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.trainer.report.metrics import read
from tests.launch.runs import (
    command,
    finish,
    kill,
    last_step,
    overrides,
    rank_pids,
    started,
    steps_of,
    wait_until,
    wait_until_gone,
)

LANES = [
    "data.mode=streaming", "data.streams=4", "data.split_bytes=1024", "data.shuffle_window=2", "data.assign_every=2",
    "data.epochs=1",
    "data.validation=0", "steps=1000", "schedule=constant", "checkpoint.every=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streaming")
    (folder / "text").mkdir()
    for shard in range(3):
        lines = [json.dumps({"text": f"document {n} says {n * n % 97} " * (n % 9 + 1)}) for n in range(shard, 120, 3)]
        (folder / "text" / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.long
def test_a_run_ends_with_its_data_and_a_killed_one_and_other_layouts_take_the_same_steps(home):
    words = command("train", *overrides(home / "whole", home / "text", *LANES))
    status, output = finish(home, words)
    assert status == 0 and "completed at step" in output
    expected = steps_of(home / "whole")
    assert len(expected) > 20
    lines = "".join((home / "text" / f"{n}.jsonl").read_text() for n in range(3)).splitlines()
    size = sum(len(json.loads(line)["text"]) + 1 for line in lines)
    assert read(RunDirectory(home / "whole").metrics)[-1]["tokens"] == size - 1  # all but the first are labels

    with started(home, command("train", *overrides(home / "killed", home / "text", *LANES))) as process:
        wait_until(lambda: last_step(home / "killed") >= 6, process)
        kill(rank_pids(home / "killed")[1])
        process.communicate(timeout=90)
    assert steps_of(home / "killed") == expected
    wait_until_gone(home)

    words = command("train", *overrides(home / "moved", home / "text", *LANES))
    assert finish(home, [*words, "steps=9"])[0] == 0
    status, output = finish(home, command("train", f"run.dir={home / 'moved'}", "steps=1000", "launch.nproc=4",
                                          "parallel.tp=2"))  # fmt: skip
    assert status == 0, output
    moved = steps_of(home / "moved")
    assert [step[0] for step in moved] == [step[0] for step in expected]
    assert [step[5] for step in moved] == [step[5] for step in expected]
    assert all(abs(a[2] - b[2]) < 1e-4 for a, b in zip(moved, expected, strict=True))
