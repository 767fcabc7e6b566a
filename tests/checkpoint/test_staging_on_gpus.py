"""Snapshots of tensors on a GPU, with a torch.cuda that records which GPU each thread uses."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from stoker.checkpoint.staging import Snapshot, StagingPool
from stoker.parallel.pinned import pinned_zeros
from stoker.parallel.shards import Shard, whole
from tests.fake_cuda import OnGpu, install, on_gpu


def shards_on_gpu(*values: float) -> list[Shard]:
    return [
        Shard(f"w{number}", "param", (1000,), whole((1000,)), on_gpu(torch.full((1000,), value)), 0, 1)
        for number, value in enumerate(values)
    ]


def staged(pool: StagingPool, shards: list[Shard]) -> list[bytes]:
    """What a writer's thread finds in the pool, as `Checkpoints` runs it: a new thread for each save."""
    snapshot, found, failures = Snapshot(shards), [], []

    def write() -> None:
        try:
            found.extend(bytes(window) for window in pool.fill(shards, snapshot))
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert not failures, failures
    return found


@pytest.mark.parametrize("limit", [None, 4096])
def test_a_writers_thread_copies_on_its_own_gpu_and_on_a_stream_that_is_kept(monkeypatch, limit) -> None:
    cuda = install(monkeypatch)
    cuda.set_device(OnGpu.number)
    pool = StagingPool(block_bytes=4096, limit=limit)
    for value in (1.0, 2.0, 3.0):
        shards = shards_on_gpu(value, -value)
        image = b"".join(staged(pool, shards))
        assert torch.full((1000,), value).numpy().tobytes() in image
        assert torch.full((1000,), -value).numpy().tobytes() in image
    assert cuda.contexts == {OnGpu.number}, "no thread made a context on another GPU"
    assert [stream.device.index for stream in cuda.streams] == [OnGpu.number], "one stream for all saves"
    assert cuda.blocking and all(cuda.blocking), "the writer sleeps while it waits"


def test_the_staging_pool_locks_what_it_needs_and_no_power_of_two(monkeypatch) -> None:
    cuda = install(monkeypatch)
    cuda.set_device(OnGpu.number)
    pool = StagingPool()
    plan = pool.prepare(shards_on_gpu(*[1.0] * 10))
    assert list(cuda.registered.values()) == [-(-plan.file_bytes // 4096) * 4096]
    pool.prepare(shards_on_gpu(*[1.0] * 20))
    gc.collect()
    assert len(cuda.registered) == 1, "the smaller one was released"


def test_locked_memory_lives_as_long_as_a_tensor_looks_into_it(monkeypatch) -> None:
    cuda = install(monkeypatch)
    memory = pinned_zeros((3, 5), torch.float32)
    assert memory.shape == (3, 5) and not memory.any() and list(cuda.registered) == [memory.data_ptr()]
    view = memory[1:].flatten()
    del memory
    gc.collect()
    assert cuda.registered, "a view holds it"
    view += 1
    del view
    gc.collect()
    assert not cuda.registered


def test_memory_that_cannot_be_locked_is_reported_with_its_size(monkeypatch) -> None:
    cuda = install(monkeypatch)
    refusing = cuda.cudart()
    refusing.cudaHostRegister = lambda *_: 2
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    with pytest.raises(RuntimeError, match=r"8,192 bytes of the host's memory could not be locked .*CUDA error 2"):
        pinned_zeros(2000)
