from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import ProfileConfig
from stoker.trainer.report.metrics import read
from stoker.trainer.report.profile import Profiler
from tests import world
from tests.launch.runs import overrides, train_forked, write_text

CPU = torch.device("cpu")
PHASES = [f"phase_{name}_seconds" for name in ("data", "forward", "backward", "update", "communication_exposed")]


def profiler(folder: Path, **config: Any) -> Profiler:
    return Profiler(ProfileConfig(**config), CPU, folder / "a" / "t.json.gz", folder / "a" / "m.pickle")


def traced(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def steps_in(path: Path) -> list[int]:
    prefix = "ProfilerStep#"
    return sorted(int(e["name"].removeprefix(prefix)) for e in traced(path) if e["name"].startswith(prefix))


def compute(seconds: float) -> None:
    """Operations for so long, on the thread that calls."""
    matrix = torch.rand(200, 200)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(matrix, matrix)


def waits_in_update(late: int) -> tuple[float, dict[str, float]]:
    """On a rank: one profiled step of 0.1 s in each phase, at whose end all wait for the rank `late`."""
    with profiler(Path("nowhere"), phases_every=5).step(10) as found:
        dist.barrier()  # before the first range, and so of no phase
        start = time.perf_counter()
        with record_function("stoker.data"):
            time.sleep(0.1)
        with record_function("stoker.forward"):
            compute(0.1)
        with record_function("stoker.backward"):
            compute(0.1)
        with record_function("stoker.update"):
            if dist.get_rank() == late:
                compute(0.8)
            dist.all_reduce(torch.ones(10))
        seconds = time.perf_counter() - start
    return seconds, found


def test_waiting_counts_as_communication_and_on_the_late_rank_as_computation():
    (seconds, waiting), (_, late) = world.run(waits_in_update, 2, 1)
    assert sorted(waiting) == sorted(PHASES)
    assert waiting["phase_communication_exposed_seconds"] > 0.4
    assert waiting["phase_update_seconds"] < 0.3
    assert late["phase_update_seconds"] > 0.79
    assert late["phase_communication_exposed_seconds"] < 0.3
    for name in ("data", "forward", "backward"):
        assert 0.09 < waiting[f"phase_{name}_seconds"] < 0.5
    assert sum(waiting.values()) == pytest.approx(seconds, abs=0.2)


def waits_for_the_first_stage() -> dict[str, float]:
    """On a rank: the first one computes for 0.8 s and sends; the second one receives."""
    row = torch.ones(10)
    with profiler(Path("nowhere"), phases_every=1).step(1) as found:
        dist.barrier()
        with record_function("stoker.forward"):
            if dist.get_rank() == 0:
                compute(0.8)
                transfer = dist.P2POp(dist.isend, row, 1)
            else:
                transfer = dist.P2POp(dist.irecv, row, 0)
            for work in dist.batch_isend_irecv([transfer]):
                work.wait()
            compute(0.1)
    return found


def test_a_stage_that_waits_for_another_has_a_bubble():
    first, second = world.run(waits_for_the_first_stage, 2)
    assert first["phase_bubble_seconds"] < 0.1 and first["phase_forward_seconds"] > 0.8
    assert second["phase_bubble_seconds"] > 0.7 and second["phase_forward_seconds"] < 0.5
    assert max(rank["phase_communication_exposed_seconds"] for rank in (first, second)) < 0.1


def hides_it_in_backward() -> dict[str, float]:
    """On a rank: an all-reduce beside 0.8 s of computation."""
    with profiler(Path("nowhere"), phases_every=1).step(1) as found:
        dist.barrier()
        with record_function("stoker.backward"):
            work = dist.all_reduce(torch.ones(1000), async_op=True)
            compute(0.8)
            work.wait()
    return found


def test_a_collective_beside_computation_is_not_exposed():
    for found in world.run(hides_it_in_backward, 2):
        assert found["phase_communication_exposed_seconds"] < 0.1
        assert found["phase_backward_seconds"] > 0.7


def trained(folder: str, steps: list[int] | None, every: int) -> list[Tensor]:
    """On a rank: parameters after five data-parallel steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    where = Path(folder) / f"rank-{dist.get_rank()}"
    profiling = Profiler(ProfileConfig(steps, every), CPU, where / "t.json.gz", where / "m.pickle")
    for step in range(1, 6):
        with profiling.step(step) as found:
            with record_function("stoker.data"):
                rows = torch.rand(8, 16, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            with record_function("stoker.forward"):
                loss = model(rows).square().sum()
            with record_function("stoker.backward"):
                loss.backward()
            with record_function("stoker.update"):
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
                optimizer.step()
                optimizer.zero_grad()
        is_traced = steps is not None and steps[0] <= step <= steps[1]
        assert sorted(found) == (sorted(PHASES) if every and step % every == 0 and not is_traced else [])
    profiling.close()
    return [parameter.detach() for parameter in model.parameters()]


def test_profiling_changes_nothing_that_is_computed(tmp_path):
    plain = world.run(trained, 2, str(tmp_path), None, 0)
    assert list(tmp_path.iterdir()) == []
    for profiled in (world.run(trained, 2, str(tmp_path), [2, 3], 2), world.run(trained, 2, str(tmp_path), None, 1)):
        for one, other in zip(plain, profiled, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for rank in range(2):
        assert steps_in(tmp_path / f"rank-{rank}" / "t.json.gz") == [2, 3]
        assert [path.name for path in (tmp_path / f"rank-{rank}").iterdir()] == ["t.json.gz"], "nothing half-written"


def test_phases_of_all_ranks_are_least_median_and_largest(tmp_path):
    file = tmp_path / "t"
    given: list[str] = []

    def gather(text: str) -> list[str]:
        given.append(text)
        own = json.loads(text)
        return [text, *(json.dumps({name: own[name] + more for name in own}) for more in (8.0, 1.0, 3.0))]

    profiling = Profiler(ProfileConfig(None, 2), CPU, file, file, gather=gather)
    with profiling.step(1) as found:
        pass
    assert (found, given) == ({}, []), "only steps with phases exchange them"
    with profiling.step(2) as found, record_function("stoker.forward"):
        torch.ones(3).add(1)
    own = found["phase_forward_seconds"]
    over = [found[f"phase_forward_seconds_{kind}"] for kind in ("min", "median", "max")]
    assert over == pytest.approx([own, own + 2.0, own + 8.0])
    assert len(found) == 4 * 2, "the phase, and exposed communication"


def run_steps(profiling: Profiler, *steps: int) -> None:
    for step in steps:
        with profiling.step(step), record_function("stoker.forward"):
            torch.ones(3).add(1)


def test_a_run_that_begins_or_ends_amid_the_traced_steps_traces_those_it_takes(tmp_path):
    profiling = profiler(tmp_path, steps=[2, 5])
    run_steps(profiling, 4, 5, 6)
    assert steps_in(tmp_path / "a" / "t.json.gz") == [4, 5]
    ended = profiler(tmp_path / "ended", steps=[2, 5])
    run_steps(ended, 1, 2, 3)
    ended.close()
    assert steps_in(tmp_path / "ended" / "a" / "t.json.gz") == [2, 3]


def test_a_step_that_fails_leaves_its_trace_and_its_error(tmp_path):
    profiling = profiler(tmp_path, steps=[1, 5])
    run_steps(profiling, 1)
    with pytest.raises(MemoryError, match="all of it"), profiling.step(2):
        raise MemoryError("all of it")
    assert steps_in(tmp_path / "a" / "t.json.gz") == [1, 2]


def test_a_disk_without_space_for_a_trace_is_named_and_the_run_continues(tmp_path):
    (tmp_path / "a").touch()
    said: list[str] = []
    profiling = Profiler(ProfileConfig([1, 1], 1), CPU, tmp_path / "a" / "t.json.gz", tmp_path / "a" / "m", said.append)
    run_steps(profiling, 1)
    assert len(said) == 1 and "no trace is written" in said[0] and str(tmp_path / "a") in said[0]
    with profiling.step(2) as found:
        run_steps(profiler(tmp_path), 2)
    assert "phase_forward_seconds" in found, "torch's profiler was left running"


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_a_gpu_memory_is_recorded_over_the_traced_steps_and_phases_wait_for_the_device(tmp_path, monkeypatch):
    """The calls of torch's guide to memory snapshots, in their order; no GPU is needed to record them."""
    calls: list[str] = []

    def record(enabled: str | None = "all", **settings: Any) -> None:
        calls.append(f"record {enabled} {sorted(settings)}")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(f"dump {path}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(f"synchronize {device}"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(f"reset peak of {device}"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 700)
    run, gpu = RunDirectory(tmp_path), torch.device("cuda", 0)
    held = {"fp32 parameters": 300}
    profiling = Profiler(ProfileConfig([2, 3], 4), gpu, run.trace(1, 0), run.memory_snapshot(1, 0), held=lambda: held)
    run_steps(profiling, 1, 2, 3, 4)
    assert calls == [
        "record all ['clear_history', 'max_entries', 'stacks']",
        "reset peak of cuda:0",
        f"dump {tmp_path}/profiles/attempt-1/rank-0.memory.pickle",
        "record None []",
        "synchronize cuda:0",
        "synchronize cuda:0",
    ]
    with gzip.open(run.trace(1, 0), "rt") as file:
        assert json.load(file)["stoker.memory"] == {"fp32 parameters": 300, "peak": 700}


@pytest.mark.long
def test_a_run_of_two_ranks_writes_a_trace_of_each_and_its_phases_into_the_metrics(tmp_path):
    run = RunDirectory(tmp_path / "run")
    asked = ["steps=5", "profile.steps=[4,9]", "profile.phases_every=2"]
    words = overrides(run.path, write_text(tmp_path / "text"), *asked)
    status, output = train_forked(tmp_path, words)
    assert status == 0, output
    assert f"traced: {run.path}/profiles/attempt-1" in output
    assert run.trace(1, 0) == run.path / "profiles" / "attempt-1" / "rank-0.trace.json.gz"
    for rank in range(2):
        names = {event["name"] for event in traced(run.trace(1, rank))}
        assert steps_in(run.trace(1, rank)) == [4, 5]
        assert {"stoker.data", "stoker.forward", "stoker.backward", "stoker.update", "aten::mm"} <= names
        assert any(name.startswith("gloo:") for name in names)
    for line in read(run.metrics):
        phases = [line[key] for key in PHASES if key in line]
        if line["step"] != 2:  # 4 is traced
            assert phases == []
        else:
            assert len(phases) == len(PHASES) and all(seconds > 0 for seconds in phases)
            for key in PHASES:
                least, median, most = (line[f"{key}_{kind}"] for kind in ("min", "median", "max"))
                assert least <= line[key] <= most and median == pytest.approx((least + most) / 2)
            assert sum(phases) <= line["step_seconds"]
