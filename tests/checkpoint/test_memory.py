"""What saves and restores ask of a machine: its memory, and its disk."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from stoker.checkpoint import newest
from stoker.parallel.shards import Shard, whole
from tests.checkpoint.simulated import Grid, cut, save, start
from tests.world import CONTEXT

MIB = 1 << 20


def peak_over_20_saves(directory: Path, options: dict) -> tuple[int, int, int]:
    """Bytes resident before there are saves, of the pool, and at the most while there were."""
    shards = [Shard(str(n), "param", (4 * MIB,), whole((4 * MIB,)), torch.full((4 * MIB,), float(n))) for n in range(3)]
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from now on
    (writer,) = start(directory, 1, keep=1, **options)
    writer.prepare(shards)
    for step in range(1, 21):
        writer.save(step, shards, {})
        writer.await_staged()
        for shard in shards:
            shard.data.add_(1)
    assert not any(report.error for report in writer.wait())
    peak, pool = resident("VmHWM"), writer._pool.bytes
    writer.close()
    return base, pool, peak


def resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


def _send(pipe, function, arguments) -> None:
    pipe.send(function(*arguments))


def in_child(function, *arguments):
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_send, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(120)
    return ours.recv()


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.long), {"staging_limit": 8 * MIB}], ids=str)
def test_twenty_saves_need_no_more_memory_than_the_pool(tmp_path, options):
    base, pool, peak = in_child(peak_over_20_saves, tmp_path, options)
    assert pool == 8 * MIB if "staging_limit" in options else 48 * MIB < pool < 49 * MIB
    assert peak <= base + pool + 64 * MIB
    assert peak >= base + pool - 8 * MIB, "it was measured"


def peak_of_loading(directory: Path) -> tuple[int, int]:
    """Bytes resident before, and at the most while a checkpoint of 48 MiB is read, a third of it transposed."""
    from stoker.checkpoint import load, open_checkpoint

    live = [torch.ones(4 * MIB), torch.ones(4 * MIB), torch.ones(2, 2 * MIB).T]
    shards = [Shard(str(n), "param", data.shape, whole(data.shape), data) for n, data in enumerate(live)]
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    load(open_checkpoint(newest(directory)[0]), shards)
    peak = resident("VmHWM")
    assert all(bool((data == n).all()) for n, data in enumerate(live))
    return base, peak


def test_loading_needs_the_shards_and_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr("stoker.checkpoint.writer.BLOCK_BYTES", 4 * MIB)
    tensors = {("param", str(n)): torch.full((4 * MIB,), float(n)) for n in range(2)}
    tensors["param", "2"] = torch.full((2 * MIB, 2), 2.0)
    save(start(tmp_path, 1), 1, cut(tensors, Grid()))
    base, peak = in_child(peak_of_loading, tmp_path)
    assert peak - base < (4 + 16) * MIB, "a second copy would be 48"


def bytes_from_the_disk(directory: Path, other: Path) -> int:
    """Bytes that this process read from the disk while it read all of the newest checkpoint.

    It reads one in `other` before, so that no code has to come from the disk while it is counted.
    """
    from stoker.checkpoint import load, open_checkpoint

    live = [torch.zeros(4 * MIB) for _ in range(3)]
    shards = [Shard(str(n), "param", data.shape, whole(data.shape), data) for n, data in enumerate(live)]

    def read_so_far() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))

    load(open_checkpoint(newest(other)[0]), shards)
    before = read_so_far()
    load(open_checkpoint(newest(directory)[0]), shards)
    assert all(bool((data == n).all()) for n, data in enumerate(live))
    return read_so_far() - before


def test_what_two_ranks_of_a_machine_need_is_read_from_the_disk_once(tmp_path, monkeypatch):
    monkeypatch.setattr("stoker.checkpoint.writer.BLOCK_BYTES", 4 * MIB)
    directory, other = tmp_path / "cold", tmp_path / "warm"
    for each in (directory, other):
        save(start(each, 1), 1, cut({("param", str(n)): torch.full((4 * MIB,), float(n)) for n in range(3)}, Grid()))
    for path in newest(directory)[0].iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    with ThreadPoolExecutor(2) as pool:
        asked = list(pool.map(lambda _: in_child(bytes_from_the_disk, directory, other), range(2)))
    if not any(asked):
        pytest.skip(f"{tmp_path} is in memory, or on a disk that is not accounted for")
    assert 47 * MIB < sum(asked) < 52 * MIB, asked
