"""What slows a run down is named first, with a setting that exists and helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stoker.conf.schema import Config, kinds
from stoker.launch.cli import main
from tests.launch.profile.fabricated import (
    AUTOGRAD,
    Events,
    a_run,
    flat,
    kernel,
    marked,
    module,
    node,
    operation,
    steps,
)


def set_to(**values: Any) -> Callable[[Config], None]:
    """Sets keys, with `__` for the dot."""

    def change(config: Config) -> None:
        for key, value in values.items():
            section, _, name = key.rpartition("__")
            setattr(getattr(config, section) if section else config, name, value)

    return change


def profiled(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["profile", str(run), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def gpu_step(kernels: list[tuple[float, float, float]], *more: dict[str, Any] | Events, end: float = 100.0) -> Events:
    """A step of `end` ms on a GPU whose kernels were launched, began and ended so."""
    gemms = [kernel("gemm", *times) for times in kernels]
    ranges = [marked("stoker.data", 0, 1), marked("stoker.forward", 1, end / 2), marked("stoker.update", end / 2, end)]
    return flat(marked("ProfilerStep#7", 0, end), *ranges, *gemms, *more)


def nccl(start: float, end: float, group: str, what: str = "all_gather") -> Events:
    args = {"Collective name": what, "Process Group Description": group, "Group size": 2}
    name = "SendRecv" if what in ("send", "recv") else "AllGather_RING_LL"
    return kernel(f"ncclDevKernel_{name}(...)", start, start, end, **args)


BUSY = [(2.0, 2.0, 49.0), (50.0, 50.0, 99.0)]
CASES: list[tuple[str, list[Events], Callable[[Config], Any], str, str | None]] = [
    ("data", [steps(data=40)], set_to(), "data", "data.workers=2"),
    ("data-of-one-rank", [steps(waits=80), steps(data=80)], set_to(data__workers=3), "data", "data.workers=6"),
    ("rank", [steps(waits=70), steps(waits=70), steps(slow=70)], set_to(), "a slow rank", None),
    ("module", [steps(modules=(10, 10, 60, 10))], set_to(), "a slow module", None),
    ("module-of-two", [steps(modules=(10, 60))], set_to(), "a slow module", None),
    ("recomputed-module", [steps(modules=(10, 90, 10, 10), again=9)], set_to(), "a slow module", None),
    ("saves", [steps(saves=50)], set_to(), "checkpoints", "checkpoint.every"),
    ("sync-saves", [steps(saves=50)], set_to(checkpoint__mode="sync"), "checkpoints", "checkpoint.mode=async"),
    ("small-staging", [steps(saves=50)], set_to(checkpoint__staging_limit=9), "checkpoints",
     "checkpoint.staging_limit=null"),
    ("communication", [steps(waits=40), steps(waits=41)], set_to(), "communication", "batch.size"),
    ("zero-3", [steps(waits=40)] * 2, set_to(parallel__zero=3), "communication", "parallel.zero=2"),
    ("zero-2", [steps(waits=40)] * 2, set_to(parallel__zero=2), "communication", "parallel.zero=1"),
    ("tensor-parallel", [gpu_step(BUSY[:1], nccl(50, 99, "tp"))], set_to(parallel__tp=4, parallel__zero=3),
     "communication", "parallel.tp=2"),
    ("sharding-beside-tp", [gpu_step(BUSY[:1], nccl(50, 99, "dp_shard"))], set_to(parallel__tp=4, parallel__zero=3),
     "communication", "parallel.zero=2"),
    ("pipeline", [gpu_step(BUSY[:1], nccl(50, 99, "pp.forward", "recv"))], set_to(parallel__pp=2),
     "bubble", "batch.micro_size"),
    ("sums-beside-a-pipeline",
     [gpu_step(BUSY[:1], nccl(50, 60, "pp.forward", "recv"), nccl(60, 99, "dp_shard", "all_reduce"))],
     set_to(parallel__pp=2), "communication", "batch.size"),
    ("recomputation", [steps(again=10)], set_to(activation_checkpointing="full"), "recomputation",
     "activation_checkpointing=selective"),
    ("some-recomputation", [steps(again=8)], set_to(activation_checkpointing="selective"), "recomputation",
     "activation_checkpointing=none"),
    ("launches", [gpu_step([(2, 2, 5), (30, 30, 33), (60, 60, 63)])], set_to(), "launches", "batch.micro_size"),
    ("launches-uncompiled", [gpu_step([(2, 2, 5), (30, 30, 33)])], set_to(compile=False), "launches", "compile=true"),
    ("nothing", [steps()], set_to(), "computation", "compile=true"),
    ("nothing-on-gpus", [gpu_step(BUSY)], set_to(precision="fp32"), "computation", "precision=bf16"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "change", "cause", "setting"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_the_planted_cause_is_named_first(tmp_path, capsys, ranks, change, cause, setting):
    found = profiled(a_run(tmp_path / "run", *ranks, change=change).path, capsys)
    first = found["findings"][0]
    assert (first["cause"], first["setting"]) == (cause, setting)
    assert setting is None or setting.partition("=")[0] in kinds()
    assert setting is None or setting in found["advice"]
    assert found["advice"].startswith(first["text"])


def test_the_slow_rank_and_its_machine_and_the_slow_module_are_named(tmp_path, capsys):
    run = a_run(tmp_path / "rank", steps(waits=70), steps(slow=70), steps(waits=70))
    found = profiled(run.path, capsys)
    assert found["slowest_rank"] == 1
    assert [finding["cause"] for finding in found["findings"]] == ["a slow rank"], "the others wait for it, and no more"
    assert "rank 1 on node-1 works 2.1 times the median" in found["advice"]
    found = profiled(a_run(tmp_path / "module", steps(modules=(10, 10, 60, 10))).path, capsys)
    assert "layers.2.mlp takes 6.0 times the median of layers.*.mlp" in found["advice"]
    assert found["findings"][0]["seconds"] == pytest.approx(0.1), "50 ms in forward, and as many in backward"


def test_the_stages_of_a_pipeline_are_not_compared(tmp_path, capsys):
    ranks = [steps(waits=70), steps(slow=70)]
    found = profiled(a_run(tmp_path / "run", *ranks, change=set_to(parallel__pp=2)).path, capsys)
    assert "a slow rank" not in {finding["cause"] for finding in found["findings"]}


def test_one_stalled_step_makes_no_module_slow(tmp_path, capsys):
    stalled = flat(steps(2), steps(1, modules=(10, 300, 10)))
    for one in stalled[-len(steps(1, modules=(10, 300, 10))) :]:
        one["ts"] += 5e6
    found = profiled(a_run(tmp_path / "run", stalled).path, capsys)
    assert "a slow module" not in {finding["cause"] for finding in found["findings"]}


def test_kernels_belong_to_the_module_that_launched_them_and_to_the_one_whose_forward_made_the_node(tmp_path, capsys):
    events = gpu_step(
        [],
        module("layers.0", 2, 10), operation("aten::mm", 3, 5, number=4), kernel("gemm", 3.5, 20, 50),
        node("MmBackward0", 20, 30, 4, AUTOGRAD), kernel("gemm", 25, 50, 95, AUTOGRAD),
        marked("stoker.backward", 11, 49),
        module("layers.0", 31, 33, AUTOGRAD), kernel("copy", 32, 95, 98, AUTOGRAD),
    )  # fmt: skip
    [rank] = profiled(a_run(tmp_path / "run", events).path, capsys)["ranks"]
    own = rank["modules"]["layers.0"]
    assert (own["forward"], own["backward"]) == pytest.approx((0.030, 0.045))
    assert own["recomputed"] == pytest.approx(0.003)
    assert [(top["name"], top["calls"]) for top in rank["top"]] == [("gemm", 2), ("copy", 1)]
    assert rank["idle_seconds"] == pytest.approx(0.022)
