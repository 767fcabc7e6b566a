"""How a shard file is written, and with how much memory: a whole pool or a window that the file streams through."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
import zlib

import pytest
import torch

from stoker.checkpoint import newest, read_tensors, verify
from stoker.checkpoint.block_writer import write_blocks
from stoker.checkpoint.memory import fresh_bytes
from stoker.checkpoint.staging import Snapshot, StagingPool
from stoker.parallel.shards import Shard, whole
from tests.checkpoint.simulated import Grid, blank, cut, end, holds, resume_all, save, small_model, start

TENSORS = small_model()


@pytest.mark.parametrize("limit", [None, 1, 5000])
def test_what_is_read_is_what_was_saved(tmp_path, limit):
    writers, grid = start(tmp_path, 4, staging_limit=limit), Grid(rows=2, columns=2)
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
    """Steps continue during the writing: everything stored is of one step."""
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
