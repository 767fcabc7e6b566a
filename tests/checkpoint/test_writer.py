"""Who writes, and with how much memory: thread or process, a whole pool or a window that the file streams through."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch

from stoker.checkpoint import Checkpoints, newest, read_tensors, verify
from stoker.checkpoint.block_writer import NICE, WriterProcess, write_blocks
from stoker.checkpoint.memory import fresh_bytes
from stoker.checkpoint.staging import Snapshot, StagingPool
from stoker.parallel.shards import Shard, whole
from tests.checkpoint.simulated import Grid, begin, blank, cut, end, holds, resume_all, save, small_model, start

TENSORS = small_model()


def process_of(writer: Checkpoints) -> int:
    assert writer._process is not None
    return writer._process.pid


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("writer", ["thread", "process"])
@pytest.mark.parametrize("limit", [None, 1, 5000])
def test_what_is_read_is_what_was_saved_whoever_wrote_it(tmp_path, writer, limit):
    writers, grid = start(tmp_path, 4, writer=writer, staging_limit=limit), Grid(rows=2, columns=2)
    for one, shards in zip(writers, cut(TENSORS, grid), strict=True):
        one.prepare(shards)
    for step in (1, 2):
        save(writers, step, cut(small_model(step), grid))
    ranks = blank(cut(TENSORS, Grid(rows=3)))
    assert resume_all(tmp_path, ranks) == [{"step": 2}] * 3
    assert holds(ranks, small_model(2)) and verify(newest(tmp_path)[0]) == []
    for one in writers:
        one.close()


def test_a_window_holds_no_more_than_the_limit_and_shows_the_same_file():
    """Shards that are no rows of anything are cut in the middle of rows too."""
    shards = [
        Shard("a", "param", (70, 60), whole((70, 60)), torch.randn(60, 70).T),
        Shard("b", "param", (3, 5, 7, 11), whole((3, 5, 7, 11)), torch.randn(3, 5, 7, 11).half()),
        Shard("c", "param", (), whole(()), torch.tensor(7.0)),
        Shard("d", "param", (0, 4), whole((0, 4)), torch.zeros(0, 4)),
    ]
    files = []
    for limit in (None, 1, 1024, 3000, 10_000):
        pool = StagingPool(1024, limit)
        windows = [bytes(window) for window in pool.fill(shards, Snapshot(shards))]
        files.append(b"".join(windows))
        assert limit is None or pool.bytes <= max(limit, 1024)
        assert all(len(window) % 1024 == 0 for window in windows[:-1])
    assert len(files[0]) > 17_000 and all(file == files[0] for file in files)


def test_with_a_limit_training_waits_until_the_last_window_is_copied(tmp_path):
    (writer,), (shards,) = start(tmp_path, 1, staging_limit=1024), cut(TENSORS, Grid())
    writer.save(1, shards, {})
    writer.await_staged()
    for shard in shards:
        shard.data.fill_(1)
    end([writer])
    ranks = blank(cut(TENSORS, Grid()))
    resume_all(tmp_path, ranks)
    assert holds(ranks, TENSORS)


def test_the_process_is_nice_and_small_and_ready_before_the_first_save(tmp_path):
    (writer,), (shards,) = start(tmp_path, 1, writer="process"), cut(TENSORS, Grid())
    writer.prepare(shards)
    pid = process_of(writer)
    assert os.getpriority(os.PRIO_PROCESS, pid) >= NICE
    mapped = Path(f"/proc/{pid}/maps").read_text()
    assert "memfd:staging" in mapped and "torch" not in mapped
    assert "isal_zlib" in mapped or importlib.util.find_spec("isal") is None, "its checksums are the fast ones"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(pid, number)  # Slurm signals all processes of a job, and the last save is still to come
    save([writer], 1, [shards])
    assert process_of(writer) == pid
    writer.close()
    assert not is_there(pid)


def test_a_process_that_is_killed_fails_the_save_and_the_next_one_has_another(tmp_path):
    writers, ranks = start(tmp_path, 2, writer="process"), cut(TENSORS, Grid(rows=2))
    for writer, shards in zip(writers, ranks, strict=True):
        writer.prepare(shards)
    pid = process_of(writers[1])
    os.kill(pid, signal.SIGKILL)
    begin(writers, 1, ranks)
    for reports in end(writers):
        assert "rank 1: the writer process has died" in (reports[0].error or "")
    save(writers, 2, ranks)
    assert [path.name for path in newest(tmp_path)] == ["step-00000002"] and process_of(writers[1]) != pid
    for writer in writers:
        writer.close()


@pytest.mark.parametrize("refusing", ["flag", "write", None])
def test_a_file_is_the_same_on_file_systems_that_write_past_the_page_cache_and_on_those_that_cannot(
    tmp_path, monkeypatch, refusing
):
    """Windows that do not end on a page, as a staging limit and a file's end make them, are written too."""
    memory = fresh_bytes(100_000)
    memory.random_(256)
    real, direct = {"fcntl": fcntl.fcntl, "write": os.write}, []

    def set_flags(descriptor, command, flags=0):
        if command == fcntl.F_SETFL and flags & os.O_DIRECT and refusing == "flag":
            raise OSError(errno.EINVAL, "Invalid argument")
        return real["fcntl"](descriptor, command, flags)

    def write(descriptor, data):
        is_direct = bool(real["fcntl"](descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        direct.append(is_direct)
        if is_direct and refusing == "write":
            raise OSError(errno.EINVAL, "Invalid argument")
        return real["write"](descriptor, data)

    monkeypatch.setattr(fcntl, "fcntl", set_flags)
    monkeypatch.setattr(os, "write", write)
    windows = [memory[:length].numpy().data for length in (40_960, 100_000, 50_000, 1)]
    checksums = write_blocks(tmp_path / "data", windows, 4096)
    expected = b"".join(bytes(window) for window in windows)
    assert (tmp_path / "data").read_bytes() == expected
    blocks = [bytes(window[n : n + 4096]) for window in windows for n in range(0, len(window), 4096)]
    assert checksums == [zlib.crc32(block) for block in blocks]
    if refusing is None:
        assert direct == [True, True, False, False, False], "whole pages on whole pages, the rest as usual"
    else:
        assert direct.count(True) == (refusing == "write")


def test_an_error_of_the_process_is_that_of_its_system_call(tmp_path):
    writer = WriterProcess()
    descriptor = os.memfd_create("staging")
    os.ftruncate(descriptor, 4096)
    writer.use_pool(descriptor, 4096)
    with pytest.raises(FileNotFoundError, match="no/such/place"):
        writer.write_blocks(Path("/no/such/place/data"), [10], 1024, lambda: None)
    os.close(descriptor)


def test_a_save_that_is_given_up_ends_the_process_at_once(tmp_path):
    writer = WriterProcess()
    descriptor = os.memfd_create("staging")
    os.ftruncate(descriptor, 4096)
    writer.use_pool(descriptor, 4096)
    os.kill(writer.pid, signal.SIGSTOP)  # as if the disk hung

    def stop() -> None:
        raise InterruptedError("the trainer leaves")

    with pytest.raises(InterruptedError):
        writer.write_blocks(tmp_path / "data", [10], 1024, stop)
    assert not is_there(writer.pid)
    os.close(descriptor)


TRAINER = """
import os, pathlib, sys, time, torch
from stoker.checkpoint import Checkpoints
from stoker.parallel.shards import Shard, whole
writer = Checkpoints(pathlib.Path(sys.argv[1]), rank=0, world=2, attempt=1, keep=1, writer="process")
shards = [Shard("w", "param", (1000,), whole((1000,)), torch.zeros(1000))]
writer.prepare(shards)
if os.fork() == 0:  # a data worker that holds the trainer's end of the socket open
    time.sleep(5)
    os._exit(0)
writer.save(1, shards, {})
print(writer._process.pid, flush=True)
time.sleep(60)
"""


def test_kill_9_of_a_trainer_ends_its_writer_process_within_two_seconds(tmp_path):
    with subprocess.Popen([sys.executable, "-c", TRAINER, tmp_path], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        assert is_there(pid)
        trainer.kill()
        trainer.wait()
        killed = time.monotonic()
        while is_there(pid) and time.monotonic() - killed < 10:
            time.sleep(0.01)
        assert time.monotonic() - killed < 2


def test_no_save_waits_for_a_removal(tmp_path, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: go.wait(10))
    (writer,) = start(tmp_path, 1, keep=1)
    for step in (1, 2):
        writer.save(step, [], {})
    while not list(tmp_path.glob("*.removed")):  # the old one has lost its name and waits
        time.sleep(0.001)
    began = time.monotonic()
    writer.save(3, [], {})
    assert time.monotonic() - began < 5 and not go.is_set()
    go.set()
    assert [report.error for report in writer.wait()] == [None] * 3


def test_a_snapshot_of_many_small_tensors_is_that_of_one_moment(tmp_path):
    """Steps go on beside the writing: what is stored is all of one step."""
    (writer,) = start(tmp_path, 1)
    shards = [Shard(str(n), "param", (9,), whole((9,)), torch.zeros(9)) for n in range(300)]
    for step in range(1, 6):
        for shard in shards:
            shard.data.fill_(step)
        writer.save(step, shards, {})
        writer.await_staged()
        for shard in shards:
            shard.data.fill_(-1)
        assert not any(report.error for report in writer.wait())
        assert all(bool((value == step).all()) for _, value in read_tensors(newest(tmp_path)[0]))
