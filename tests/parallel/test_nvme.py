"""`parallel.offload=nvme`: the same numbers, from private files that are never left behind."""

from __future__ import annotations

import copy
import gc
import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stoker.conf.schema import BatchConfig, Config, OptimConfig, ParallelConfig
from stoker.conf.values import ConfigError
from stoker.parallel.deepspeed_engine.async_io import is_built, missing_for_async_io
from stoker.parallel.deepspeed_engine.swapping import require_lockable, swap_folder
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.mmap_offload import LARGE_BYTES, MappedMemory
from stoker.parallel.shards import PARAMETER, Shard
from stoker.trainer.parallelize import cut
from stoker.trainer.runtime.process import give_freed_memory_back
from stoker.trainer.validate import validate
from tests import world
from tests.parallel.reference import assemble, global_rows, normwise, one_process, small_config
from tests.trainer.test_resume import HALF, half

BUILD = "python -m stoker.parallel.deepspeed_engine.async_io"
MISSING = missing_for_async_io() or (None if is_built() else f"it takes minutes to build, {BUILD} does")
STEPS = 4
WIDTH = 514  # of the toy: half a matrix is a MiB and a little, so that DeepSpeed swaps it; it divides over nothing


def config_of(path: Path | str, layout: Layout, offload: str = "nvme", **changes: Any) -> Config:
    config = small_config(batch=BatchConfig(size=8, micro_size=2), **changes)
    config.model.hidden_size = WIDTH
    config.optim = OptimConfig(name="adamw", lr=1e-3)
    config.parallel = ParallelConfig(
        tp=layout.tp,
        zero=layout.zero,
        dp_replicate=layout.dp_replicate if layout.zero else None,
        engine="deepspeed",
        offload=offload,
        nvme_path=str(path),
    )
    return config


needs_async_io = pytest.mark.skipif(MISSING is not None, reason=f"no async IO of DeepSpeed: {MISSING}")


@dataclass(frozen=True)
class Found:
    """What one rank saw of one config."""

    losses: list[float]
    norms: list[float]
    evaluated: list[float]  # twice before each step
    parameters: list[Shard]
    mapped_bytes: int  # of files without a name
    swapped: int  # files of parameters


def look(configs: list[Config], steps: int = STEPS) -> list[Found]:
    return [look_at(config, steps) for config in configs]


def look_at(config: Config, steps: int) -> Found:
    """On a rank: evaluate and train; the files on the disk meanwhile."""
    assert config.parallel.nvme_path is not None
    folder = Path(config.parallel.nvme_path)
    before = mapped_bytes(folder)
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    losses, norms, evaluated = [], [], []
    for step in range(1, steps + 1):
        rows = global_rows(config, step)[mesh.dp_rank :: layout.dp]
        evaluated += [float(mesh.all_reduce(engine.evaluate(rows))[0]) for _ in range(2)]
        engine.forward_backward(rows)
        result = engine.update(config.optim.lr).read()
        losses.append(result.loss)
        norms.append(result.grad_norm)
    parameters = [replace(shard, data=shard.data.clone()) for shard in engine.shards() if shard.kind == PARAMETER]
    swapped = len(list(folder.glob("**/*.swp")))
    dist.barrier()
    found = Found(losses, norms, evaluated, parameters, mapped_bytes(folder) - before, swapped)
    del engine
    gc.collect()
    dist.barrier()
    return found


def mapped_bytes(folder: Path) -> int:
    """Of this process's memory, what is a mapping of a file without a name in `folder`."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert all(line.endswith("(deleted)") for line in lines)
    spans = (re.match(r"(\w+)-(\w+) rw-s", line) for line in lines)
    return sum(int(span[2], 16) - int(span[1], 16) for span in spans if span)


@pytest.mark.long
@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param([Layout(2), Layout(1, 2, zero=1), Layout(1, 2, zero=2)], id="ZeRO 0 to 2"),
        pytest.param([Layout(1, 2, zero=3)], id="ZeRO 3", marks=needs_async_io),
    ],
)
def test_every_stage_computes_the_same_as_in_memory_to_the_last_bit(tmp_path: Path, layouts: list[Layout]) -> None:
    configs = [config_of(tmp_path, layout, offload) for layout in layouts for offload in ("cpu", "nvme")]
    ranks = world.run(look, 2, configs, timeout=200.0, fresh=True)
    wanted = one_process(configs[0], STEPS)
    for number, layout in enumerate(layouts):
        found = [rank[2 * number + 1] for rank in ranks]
        for cpu, nvme in zip([rank[2 * number] for rank in ranks], found, strict=True):
            assert_bitwise(nvme, cpu)
            held = sum(shard.data.numel() for shard in nvme.parameters)
            large = 4 * 3 * held  # masters and two moments at least; what is small stays in memory
            assert nvme.mapped_bytes > 0.9 * large and cpu.mapped_bytes == 0, layout
            assert nvme.swapped == (8 if layout.zero == 3 else 0), f"{layout}: two ranks' files of four matrices"
        assert found[0].losses == pytest.approx(wanted.losses, rel=1e-5), layout
        assert found[0].norms == pytest.approx(wanted.norms, rel=1e-5), layout
        parameters = assemble([rank.parameters for rank in found])
        for name, value in wanted.parameters.items():
            assert normwise(parameters[name], value) < 1e-4, f"{layout}: {name}"
    assert not list(tmp_path.iterdir()), "left behind"


def assert_bitwise(one: Found, other: Found) -> None:
    assert (one.losses, one.norms, one.evaluated) == (other.losses, other.norms, other.evaluated)
    assert all(torch.equal(a.data, b.data) for a, b in zip(one.parameters, other.parameters, strict=True))


@pytest.mark.long
@needs_async_io
def test_frozen_parameters_small_groups_and_bf16_train_as_in_memory(tmp_path: Path) -> None:
    frozen, grouped, bf16 = (config_of(tmp_path, Layout(1, 2, zero=3)) for _ in range(3))
    frozen.model.target = "tests.toy:build_frozen"
    grouped.parallel.deepspeed = {"zero_optimization": {"stage3_sub_group_size": 300_000}}
    bf16.precision, bf16.model.hidden_size = "bf16", 2 * WIDTH
    swapped = [frozen, grouped, bf16]
    configs = [*swapped, *copy.deepcopy(swapped)]
    for config in configs[3:]:
        config.parallel.offload = "cpu"
    for rank in world.run(look, 2, configs, 2, timeout=120.0, fresh=True):
        for nvme, cpu in zip(rank[:3], rank[3:], strict=True):
            assert_bitwise(nvme, cpu)
            assert nvme.swapped and not cpu.swapped


@pytest.mark.long
@needs_async_io
def test_a_run_goes_to_nvme_and_away_and_back(tmp_path: Path) -> None:
    """DeepSpeed's ZeRO 3 on NVMe -> our own ZeRO 3 -> ZeRO 1 on NVMe: the losses of one process."""
    nvme, checkpoints = tmp_path / "nvme", tmp_path / "checkpoints"
    ours = config_of(nvme, Layout(1, 2, zero=3), "none")
    ours.parallel.engine = "fsdp"
    starts = [config_of(nvme, Layout(1, 2, zero=3)), ours, config_of(nvme, Layout(1, 2, zero=1))]
    wanted = one_process(ours, len(starts) * HALF)
    shards: list[list[Shard]] = []
    for number, config in enumerate(starts):
        found = world.run(half, 2, config, checkpoints, timeout=60.0, fresh=True)
        losses, norms = zip(*found[0][0], strict=True)
        done = number * HALF
        assert losses == pytest.approx(wanted.losses[done : done + HALF], rel=1e-5), number
        assert norms == pytest.approx(wanted.norms[done : done + HALF], rel=1e-5), number
        shards = [held for _, held in found]
    parameters = assemble(shards)
    for name, value in wanted.parameters.items():
        assert normwise(parameters[name], value) < 1e-4, name


def under_a_limit(config: Config, limit: int) -> None:
    """On a rank: train with at most `limit` bytes of private memory more than there are."""
    import deepspeed  # noqa: F401  (its memory is not what is measured)

    give_freed_memory_back()  # as a run does
    used = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert used is not None
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(used[1]) + limit, resource.RLIM_INFINITY))
    look_at(config, 2)


@pytest.mark.long
@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=needs_async_io)])
def test_a_run_fits_where_offload_to_the_cpu_finds_too_little_memory(tmp_path: Path, zero: int) -> None:
    config = config_of(tmp_path, Layout(zero=zero))
    config.model.hidden_size, config.model.num_hidden_layers = 1024, 4
    config.parallel.deepspeed = {"zero_optimization": {"reduce_bucket_size": 1 << 20, "sub_group_size": 1 << 20}}
    parameters = 4 * 2 * 1024 * 2048  # in the matrices of four layers
    # Bytes. On NVMe it takes less than 18 and 12 for a parameter, in the CPU's memory more than 34 and 24.
    limit = (24 if zero == 2 else 18) * parameters
    world.run(under_a_limit, 1, config, limit, fresh=True)
    config.parallel.offload = "cpu"
    with pytest.raises(AssertionError, match="allocate memory"):
        world.run(under_a_limit, 1, config, limit, fresh=True)


def test_what_is_large_is_mapped_and_computes_like_any_tensor(tmp_path: Path) -> None:
    count = LARGE_BYTES // 4
    with MappedMemory(tmp_path):
        parameter = torch.nn.Parameter(torch.zeros(count))
        parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW([parameter], fused=True)
        optimizer.step()
        small, other = torch.zeros(count - 1), torch.empty(count, device="meta")
        half_precision = torch.arange(2 * count, dtype=torch.float32).to(torch.bfloat16)
        copied = half_precision.clone()
    assert torch.equal(copied, torch.arange(2 * count, dtype=torch.float32).bfloat16())
    assert optimizer.state[parameter]["exp_avg"].allclose(torch.full((count,), 0.1))
    assert mapped_bytes(tmp_path) == (3 + 1 + 1) * LARGE_BYTES
    assert other.is_meta and not small.any() and not list(tmp_path.iterdir())
    del parameter, optimizer, half_precision, copied
    gc.collect()
    assert mapped_bytes(tmp_path) == 0


@contextmanager
def limited(kind: int, least: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (least, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_disk_without_room_is_one_clear_line(tmp_path: Path) -> None:
    with limited(resource.RLIMIT_FSIZE, LARGE_BYTES), MappedMemory(tmp_path):
        torch.zeros(LARGE_BYTES, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"parallel.nvme_path=.*: no room for 2,097,152 bytes: File too large"):
            torch.zeros(2 * LARGE_BYTES, dtype=torch.uint8)


def test_memory_that_may_not_be_locked_is_one_clear_line() -> None:
    require_lockable(4096)
    with pytest.raises(ValueError, match=r"DeepSpeed locks .* bytes of memory as buffers.*ulimit -l"):
        require_lockable(1 << 46)


def refused(config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        validate(config, 2, 0)
    return str(error.value)


def test_a_path_that_cannot_be_written_is_refused_before_a_rank_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refused(config_of(tmp_path / "file" / "below", Layout(zero=1)))
    assert (
        said
        == f"parallel.nvme_path={tmp_path}/file/below: Not a directory; name another, or parallel.offload=cpu works"
    )


def test_reading_ahead_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, Layout(zero=3))
    config.parallel.deepspeed = {"zero_optimization": {"stage3_prefetch_bucket_size": 10}}
    assert "zero_optimization.stage3_prefetch_bucket_size with parallel.offload=nvme" in refused(config)
    config.parallel.offload = "cpu"
    validate(config, 2, 0)


@pytest.mark.parametrize(
    ("compiler", "said"), [("false", "install libaio-dev (Debian"), ("none-such", "no C++ compiler (none-such)")]
)
def test_what_the_async_io_needs_is_named_before_a_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, said: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    message = refused(config_of(tmp_path, Layout(zero=3)))
    assert said in message and "\n" not in message and "parallel.zero=2 does without" in message
    validate(config_of(tmp_path, Layout(zero=2)), 2, 0)


def test_folders_of_processes_that_were_killed_are_removed_and_others_are_not(tmp_path: Path) -> None:
    mine = swap_folder(tmp_path)
    child = os.fork()
    if child == 0:
        theirs = swap_folder(tmp_path)
        (theirs.path / "some.swp").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    other = swap_folder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine.path, other.path])
    del mine, other
    gc.collect()
    assert not list(tmp_path.iterdir())
