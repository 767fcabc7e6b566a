"""Which GPU each rank takes, on every way to start a run, with a torch.cuda that has 8 GPUs, one, or none."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.launch import train as local
from stoker.launch.kubernetes.pod import ranks_on
from stoker.launch.slurm import submit
from stoker.launch.slurm.batch import job_from
from stoker.parallel.devices import backend_of, pick_device
from stoker.parallel.start import Ranks
from stoker.trainer.runtime.gpus import (
    COMPILED_VARIABLE,
    NCCL_ENVIRONMENT,
    TRACE_VARIABLE,
    ranks_of,
    refuse_shared_gpus,
    set_environment,
    shared_gpus,
    take_device,
)
from stoker.trainer.runtime.process import (
    ALLOCATOR_VARIABLE,
    Place,
    allocator_settings,
    place_from_environment,
    set_allocator,
)
from stoker.trainer.validate import validate
from tests.fake_cuda import install


def config_of(**launch: object) -> Config:
    config = Config()
    config.batch.size = 48  # divides over every number of ranks here
    for key, value in launch.items():
        setattr(config.launch, key, value)
    return config


def by_stoker_train(config: Config, machines: int) -> list[tuple[Ranks, int]]:
    ranks = local.where(config)
    return [(ranks, rank) for rank in range(ranks.world)]


def by_torchrun(config: Config, machines: int, restarts: int = 0) -> list[tuple[Ranks, int]]:
    """Eight ranks on each machine; what each of them finds."""
    found = []
    for rank in range(8 * machines):
        variables = {"RANK": rank, "WORLD_SIZE": 8 * machines, "LOCAL_RANK": rank % 8, "LOCAL_WORLD_SIZE": 8}
        variables |= {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": restarts}
        os.environ |= {name: str(value) for name, value in variables.items()}
        found.append((ranks_of(config, place_from_environment()), rank % 8))
    return found


def by_elastic_restart(config: Config, machines: int) -> list[tuple[Ranks, int]]:
    """One machine has been lost, or another has come."""
    return by_torchrun(config, machines, restarts=1)


def by_srun(config: Config, machines: int) -> list[tuple[Ranks, int]]:
    """As docs/gpus.md shows it: a task for each rank, which sets torchrun's variables from Slurm's."""
    return by_torchrun(config, machines)


def by_slurm_job(config: Config, machines: int) -> list[tuple[Ranks, int]]:
    """The batch script judges with the GPUs of its node; our launcher on each node starts the ranks."""
    gpus = local.gpus(config)
    job = job_from({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": str(machines), "SLURM_GPUS_ON_NODE": str(gpus)})
    ranks = job.where(config)
    assert ranks.here is not None
    return [(ranks, rank % ranks.here) for rank in range(ranks.world)]


def by_stoker_submit(config: Config, machines: int) -> list[tuple[Ranks, int]]:
    """Before there is a job: the GPUs that it asks for."""
    config.launch.name, config.launch.nodes, config.launch.gpus = "slurm", machines, local.gpus(config) or None
    ranks = submit.where(config)
    assert ranks.here is not None
    return [(ranks, rank % ranks.here) for rank in range(ranks.world)]


def by_kubernetes_pod(config: Config, machines: int) -> list[tuple[Ranks, int]]:
    ranks = ranks_on(machines, config)
    assert ranks.here is not None
    return [(ranks, rank % ranks.here) for rank in range(ranks.world)]


PATHS: list[Callable[[Config, int], list[tuple[Ranks, int]]]] = [
    by_stoker_train, by_torchrun, by_elastic_restart, by_srun, by_slurm_job, by_stoker_submit,
    by_kubernetes_pod,
]  # fmt: skip


@pytest.mark.parametrize("gpus", [8, 1, 0])
@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_every_way_to_start_gives_each_rank_a_gpu(path, machines, gpus, monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    install(monkeypatch, gpus)
    config = config_of()
    started = path(config, machines)
    whole = 1 if path is by_stoker_train else machines
    each = {8: 8, 1: 1, 0: 2}[gpus]  # ranks on a machine that Stoker's launchers start
    if path in (by_torchrun, by_elastic_restart, by_srun):
        each = 8
    assert len(started) == each * whole
    for ranks, local_rank in started:
        validate(config, *ranks)
        device = pick_device(config.launch.device, local_rank, each, config.launch.backend)
        wanted = {8: f"cuda:{local_rank}", 1: "cuda:0", 0: "cpu"}[gpus]
        assert str(device) == wanted
        assert backend_of(config.launch.backend, device) == ("gloo" if gpus == 0 else "nccl")


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (Ranks(2, 1), "2 ranks on 1 GPU: launch.nproc=1 works, or launch.device=cpu; launch.backend=gloo lets"),
        (Ranks(16, 4, 8), "8 ranks on 4 GPUs: launch.nproc=4 works"),
        (Ranks(16, 2, 8, one_each=True), "8 ranks on 2 GPUs of this machine: start 2 ranks on it (torchrun --nproc-"),
    ],
    ids=str,
)
def test_ranks_without_a_gpu_of_their_own_are_refused_where_they_start(ranks: Ranks, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config_of(), *ranks)
    assert words in str(refused.value)
    validate(config_of(backend="gloo"), *ranks)
    validate(config_of(device="cpu"), *ranks._replace(gpus=0))


def test_a_rank_that_sees_some_gpus_but_not_its_own_is_refused(monkeypatch) -> None:
    install(monkeypatch, 2)
    with pytest.raises(ConfigError, match=r"rank 2 of the 4 on this machine sees 2 GPUs: show each rank all of them"):
        pick_device(None, 2, 4)
    assert str(pick_device(None, 3, 4, "gloo")) == "cuda:1", "over gloo ranks share"
    install(monkeypatch, 0)
    with pytest.raises(ConfigError, match="this rank sees no GPU"):
        pick_device("cuda", 0)


def test_ranks_that_have_the_same_gpu_are_told_apart_by_its_uuid() -> None:
    assert shared_gpus([("a", "GPU-0"), ("a", "GPU-1"), ("b", "GPU-0"), ("b", "GPU-1")]) is None
    problem = shared_gpus([("a", "GPU-0"), ("a", "GPU-1"), ("a", "GPU-0")])
    assert problem is not None and problem.startswith("ranks 0 and 2 on a have the same GPU GPU-0, and NCCL needs one")


def taken(uuids: list[str], **launch: object) -> list[object]:
    """What `take_device` gives each rank of a machine that sees one GPU: its own where the UUIDs differ."""
    store, found = dist.HashStore(), [None] * len(uuids)

    def take(rank: int) -> None:
        try:
            refuse_shared_gpus(store, Place(rank, len(uuids), rank, len(uuids), 0), uuids[rank], "host")
        except ConfigError as error:
            found[rank] = error

    threads = [threading.Thread(target=take, args=(rank,)) for rank in range(len(uuids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return found


def test_all_ranks_refuse_a_shared_gpu_before_nccl_connects() -> None:
    assert taken(["GPU-0", "GPU-1"]) == [None, None]
    assert all("have the same GPU GPU-0" in str(error) for error in taken(["GPU-0", "GPU-0"]))


def test_a_rank_knows_its_gpu_and_host_by_name(monkeypatch) -> None:
    cuda = install(monkeypatch, 8)
    device, name = take_device(config_of(), Place(0, 1, 0, 1, 0), dist.HashStore())
    assert str(device) == "cuda:0" and name is not None and name.startswith("GPU-00000000-aaaa on ")
    assert cuda.current == 0 and cuda.contexts == {0}
    assert take_device(config_of(device="cpu"), Place(0, 1, 0, 1, 0), dist.HashStore())[1] is None


def test_the_environment_of_nccl_is_set_where_the_user_has_not(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "77"})
    set_environment(tmp_path)
    expected = {**NCCL_ENVIRONMENT, "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "77"}
    assert {name: os.environ[name] for name in expected} == expected
    assert Path(os.environ[TRACE_VARIABLE]).parent == tmp_path
    assert tmp_path not in Path(os.environ[COMPILED_VARIABLE]).parents, "no run directory may hold code"
    page = (Path(__file__).resolve().parents[3] / "docs" / "gpus.md").read_text()
    assert all(f"`{name}" in page for name in [*NCCL_ENVIRONMENT, TRACE_VARIABLE, COMPILED_VARIABLE]), (
        "each is documented"
    )


@pytest.mark.parametrize(
    ("launch", "parallel", "ranks", "words"),
    [
        ({"backend": "nccl"}, {}, Ranks(2, 0), "launch.backend=nccl on CPUs: leave launch.backend out"),
        ({"backend": "gloo"}, {"pp": 2}, Ranks(2, 1), "parallel.pp=2 with launch.backend=gloo on GPUs: parallel.pp=1"),
    ],
)
def test_backends_that_cannot_carry_a_layout_are_refused(launch, parallel, ranks, words) -> None:
    config = config_of(**launch)
    for key, value in parallel.items():
        setattr(config.parallel, key, value)
    with pytest.raises(ConfigError) as refused:
        validate(config, *ranks)
    assert words in str(refused.value)
    config.launch.backend = None
    config.launch.device = "cpu"
    validate(config, *ranks._replace(gpus=0))


@pytest.mark.parametrize("name", [ALLOCATOR_VARIABLE, "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_set_where_the_user_has_not(name: str, monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", {name: "max_split_size_mb:64"})
    set_allocator()
    assert os.environ == {name: "max_split_size_mb:64"}
    monkeypatch.setattr(os, "environ", {})
    set_allocator()
    assert os.environ[ALLOCATOR_VARIABLE].startswith("expandable_segments:True")
    assert "pinned" in allocator_settings("2.13.0+cu130") and "pinned" not in allocator_settings("2.11.0")
