"""A failure anywhere fails the save on all ranks, with one line, and never the checkpoint before."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from stoker.checkpoint import commit, fence, newest, verify, writer
from stoker.checkpoint.block_writer import write_blocks
from stoker.checkpoint.names import FENCE, MANIFEST
from stoker.checkpoint.staging import StagingPool
from tests.checkpoint.simulated import Grid, begin, blank, cut, end, holds, resume_all, save, saved, small_model, start
from tests.world import CONTEXT

TENSORS = small_model()


def errors(writers) -> list[str]:
    return [report.error or "" for reports in end(writers) for report in reports]


def in_child(function, *arguments) -> str:
    """The result of `function` in a separate process."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_send, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(60)
        return ours.recv()
    finally:
        process.kill()
        process.join()


def _send(pipe, function, arguments) -> None:
    pipe.send(function(*arguments))


def only_first_is_left(directory: Path) -> None:
    """The checkpoint before is sound, and nothing big is left behind."""
    assert verify(directory / "step-00000001") == []
    left = {entry.name for entry in directory.iterdir()} - {"step-00000001", "FENCE"}
    assert all(name.endswith(".failed.json") for name in left), left


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
@pytest.mark.parametrize("unlucky", [0, 1])
def test_an_error_of_storage_on_one_rank_fails_the_save_on_all(tmp_path, monkeypatch, call, unlucky):
    saved(tmp_path, TENSORS, 1)
    writers, ranks = start(tmp_path, 2), cut(TENSORS, Grid(rows=2))
    marked = f"rank-0000{unlucky}.safetensors" if call != "rename" else f"rank-0000{unlucky}.index.json.tmp"
    opened = set()
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "close")}
    replace = Path.replace

    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    def fake_open(path, *rest, **options):
        if call == "open" and str(path).endswith(marked):
            fail(path)
        descriptor = real["open"](path, *rest, **options)
        if str(path).endswith(marked):
            opened.add(descriptor)
        return descriptor

    def faulty(name):
        def act(descriptor, *rest):
            if name == call and descriptor in opened:
                fail(descriptor)
            return real[name](descriptor, *rest)

        return act

    def fake_close(descriptor):
        opened.discard(descriptor)
        real["close"](descriptor)

    def fake_replace(path, target):
        if call == "rename" and path.name == marked:
            fail(path)
        return replace(path, target)

    monkeypatch.setattr(os, "open", fake_open)
    monkeypatch.setattr(os, "write", faulty("write"))
    monkeypatch.setattr(os, "fsync", faulty("fsync"))
    monkeypatch.setattr(os, "close", fake_close)
    monkeypatch.setattr(Path, "replace", fake_replace)
    begin(writers, 2, ranks)
    found = errors(writers)
    monkeypatch.undo()
    assert len(found) == 2
    assert all(f"rank {unlucky}: " in error and "Input/output error" in error for error in found), found
    only_first_is_left(tmp_path)
    save(writers, 2, ranks)  # and the step can be saved again
    assert len(newest(tmp_path)) == 2 and verify(tmp_path / "step-00000002") == []


@pytest.mark.parametrize("what", ["write_durably", "sync_directory", "decode_head"])
def test_an_error_during_the_commit_fails_the_save_on_all(tmp_path, monkeypatch, what):
    saved(tmp_path, TENSORS, 1)
    writers, ranks = start(tmp_path, 2), cut(TENSORS, Grid(rows=2))
    real = getattr(commit, what)

    def fail_once(*arguments):
        monkeypatch.setattr(commit, what, real)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(commit, what, fail_once)
    begin(writers, 2, ranks)
    assert ["Input/output error" in error for error in errors(writers)] == [True, True]
    only_first_is_left(tmp_path)
    save(writers, 2, ranks)


def test_a_rank_that_begins_after_rank_0_abandoned_the_save_reports_its_reason(tmp_path):
    writers, ranks = start(tmp_path, 2, timeout_seconds=0.1), cut(TENSORS, Grid(rows=2))
    writers[0].save(1, ranks[0], {})
    assert "no report in time from 1 of 2 ranks: 1" in (writers[0].wait()[0].error or "")
    writers[1].save(1, ranks[1], {})
    assert "no report in time from 1 of 2 ranks: 1" in (writers[1].wait()[0].error or "")
    assert not list(tmp_path.glob("*.partial"))
    save(start(tmp_path, 2), 2, ranks)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000002"]  # a commit clears the notes away


def test_a_rank_that_fails_after_rank_0_gave_up_leaves_nothing_behind(tmp_path, monkeypatch):
    writers, ranks = start(tmp_path, 2, timeout_seconds=0.1), cut(TENSORS, Grid(rows=2))
    writers[0].save(1, ranks[0], {})
    writers[0].wait()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_000, 1_000))
    writers[1].save(1, ranks[1], {})
    assert "1,000 are free" in (writers[1].wait()[0].error or "")
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".json"]


def test_a_file_that_exists_is_never_written_over(tmp_path):
    (tmp_path / "data").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        write_blocks(tmp_path / "data", [memoryview(b"new")], 1024)
    assert (tmp_path / "data").read_bytes() == b"kept"


def test_a_slow_rank_cannot_report_its_failed_save_as_the_next_one_of_that_step(tmp_path, monkeypatch):
    old, new = small_model(1), small_model(2)
    go = threading.Event()
    fill = StagingPool.fill

    def slow_fill(pool, shards, snapshot):
        for window in fill(pool, shards, snapshot):
            assert pool is not slow._pool or go.wait(10)
            yield window

    monkeypatch.setattr(StagingPool, "fill", slow_fill)
    (first, _), (_, slow) = start(tmp_path, 2, timeout_seconds=0.1), start(tmp_path, 2)
    for one, shards in zip((first, slow), cut(old, Grid(rows=2)), strict=True):
        one.save(1, shards, {})
    assert first.wait()[0].error
    again = threading.Thread(target=slow.save, args=(1, cut(new, Grid(rows=2))[1], {}))
    again.start()
    first._timeout = 20.0
    first.save(1, cut(new, Grid(rows=2))[0], {})
    while not list(tmp_path.glob("*.partial/rank-00000.index.json")):
        time.sleep(0.001)
    go.set()
    again.join(10)
    assert [report.error for report in first.wait()][1:] == [None]
    assert [bool(report.error) for report in slow.wait()] == [True, False]
    ranks = blank(cut(new, Grid()))
    resume_all(tmp_path, ranks)
    assert holds(ranks, new)


def test_a_rank_whose_rank_0_is_gone_does_not_wait_for_ever(tmp_path):
    writers, ranks = start(tmp_path, 2, timeout_seconds=0.1), cut(TENSORS, Grid(rows=2))
    writers[1].save(1, ranks[1], {})
    assert "rank 0 has neither committed nor abandoned" in (writers[1].wait()[0].error or "")


def test_too_little_free_space_is_reported_in_bytes_before_anything_is_written(tmp_path, monkeypatch):
    saved(tmp_path, TENSORS, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_000, 1_000))
    writers = start(tmp_path, 2)
    begin(writers, 2, cut(TENSORS, Grid(rows=2)))
    for error in errors(writers):
        assert "bytes, 1,000 are free" in error and "this rank writes" in error
    only_first_is_left(tmp_path)


def test_a_full_disk_fails_the_save_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("cannot mount a small file system")
    try:
        monkeypatch.setattr(writer, "require_space", lambda *_: None)  # others fill the disk meanwhile
        saved(disk, TENSORS, 1)
        large = {("param", "w"): torch.zeros(300_000)}
        writers = start(disk, 2)
        begin(writers, 2, cut(large, Grid(rows=2)))
        found = errors(writers)
        assert any("No space left on device" in error for error in found)
        for error in found:  # the rank that comes second may see that the save was given up
            assert re.search("No space left on device|abandoned this save", error) and "\n" not in error
        only_first_is_left(disk)
        save(writers, 3, cut(TENSORS, Grid(rows=2)))
    finally:
        subprocess.run(["umount", disk], check=True)


def save_with_small_files(directory: Path) -> list[str]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    writers = start(directory, 2)
    begin(writers, 2, cut({("param", "w"): torch.zeros(60_000)}, Grid(rows=2)))
    return errors(writers)


@pytest.mark.long
def test_a_limit_on_file_sizes_fails_the_save_and_keeps_the_checkpoint_before(tmp_path):
    saved(tmp_path, TENSORS, 1)
    for error in in_child(save_with_small_files, tmp_path):
        assert "File too large" in error
    only_first_is_left(tmp_path)


def save_without_rights(directory: Path) -> list[str]:
    if os.getuid() == 0:
        os.setuid(65534)  # root may write anywhere
    writers = start(directory, 2)
    begin(writers, 2, cut(TENSORS, Grid(rows=2)))
    return errors(writers)


@pytest.mark.long
def test_a_directory_that_cannot_be_written_fails_the_save(tmp_path):
    saved(tmp_path, TENSORS, 1)
    above = [path for path in tmp_path.parents if Path(tempfile.gettempdir()) in path.parents]
    modes = {path: path.stat().st_mode for path in (tmp_path, *above)}
    for path in modes:
        path.chmod(0o555)
    try:
        found = in_child(save_without_rights, tmp_path)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert all("Permission denied" in error for error in found) and len(found) == 2
    only_first_is_left(tmp_path)


def test_an_orphan_that_writes_when_a_new_attempt_begins_cannot_commit(tmp_path):
    orphans, ranks = start(tmp_path, 2, attempt=1), cut(TENSORS, Grid(rows=2))
    orphans[0].save(1, ranks[0], {"who": "orphan"})  # waits for rank 1's report
    while not list(tmp_path.glob("*.partial/rank-00000.index.json")):
        time.sleep(0.001)
    fence(tmp_path, 2)
    orphans[1].save(1, ranks[1], {})
    assert all(error for error in errors(orphans))
    assert newest(tmp_path) == []
    save(start(tmp_path, 2, attempt=2), 1, ranks)


def test_an_orphan_that_begins_a_save_after_the_fence_cannot_commit(tmp_path):
    fence(tmp_path, 2)
    orphans, ranks = start(tmp_path, 2, attempt=1), cut(TENSORS, Grid(rows=2))
    begin(orphans, 1, ranks)
    assert all("attempt 2 of this run has begun" in error for error in errors(orphans))
    assert newest(tmp_path) == [] and not list(tmp_path.glob("*.partial"))


def test_an_orphan_stopped_right_before_its_rename_cannot_commit(tmp_path, monkeypatch):
    orphans, ranks = start(tmp_path, 1, attempt=1), cut(TENSORS, Grid())
    real = commit.write_durably

    def fenced_meanwhile(path, data):
        real(path, data)
        if path.name == MANIFEST:
            monkeypatch.setattr(commit, "write_durably", real)
            fence(tmp_path, 2)

    monkeypatch.setattr(commit, "write_durably", fenced_meanwhile)
    begin(orphans, 1, ranks)
    assert all(errors(orphans)) and newest(tmp_path) == []


def test_an_orphan_that_finds_only_the_file_of_a_fence_right_before_its_rename_cannot_commit(tmp_path, monkeypatch):
    """The new attempt has written its fence and not yet renamed the orphan's directory away."""
    orphans, ranks = start(tmp_path, 1, attempt=1), cut(TENSORS, Grid())
    real = commit.write_durably

    def fence_begun(path, data):
        real(path, data)
        if path.name == MANIFEST:
            real(tmp_path / FENCE, json.dumps({"attempt": 2}).encode())

    monkeypatch.setattr(commit, "write_durably", fence_begun)
    begin(orphans, 1, ranks)
    assert all("attempt 2 of this run has begun" in error for error in errors(orphans))
    assert newest(tmp_path) == [] and not list(tmp_path.glob("*.partial"))


def test_a_fence_removes_what_is_unfinished_and_nothing_else(tmp_path):
    saved(tmp_path, TENSORS, 1)
    for name in ("step-00000002.attempt-1.partial", "step-00000001.attempt-1.abandoned", "damaged"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / "step-00000003.attempt-1.failed.json").write_text("{}")
    fence(tmp_path, 2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["FENCE", "damaged", "step-00000001"]


def test_a_process_that_fails_during_a_save_ends_at_once(tmp_path):
    """The writer of rank 0 waits for a rank 1 that never comes; the process must not wait for the writer.

    Only the wait is measured: on a busy machine the start and the end of an interpreter take seconds.
    """
    script = (
        "import atexit, sys, pathlib, time; from stoker.checkpoint import Checkpoints\n"
        "atexit.register(lambda: print('left', time.monotonic(), flush=True))  # the last to be called\n"
        "folder = pathlib.Path(sys.argv[1]); writer = Checkpoints(folder, rank=0, world=2, attempt=1, keep=1)\n"
        "writer.save(1, [], {})\n"
        "while not list(folder.glob('*.partial/rank-00000.index.json')): time.sleep(0.01)\n"
        "atexit.register(lambda: print('ending', time.monotonic(), flush=True)); raise RuntimeError('crash')"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    ending, left = (float(line.split()[1]) for line in result.stdout.splitlines())
    assert left - ending < 3
    assert result.returncode == 1 and "RuntimeError: crash" in result.stderr and "terminate" not in result.stderr
