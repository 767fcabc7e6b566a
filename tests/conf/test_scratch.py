from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from stoker.conf.scratch import Scratch


def test_what_a_killed_process_has_left_is_removed_by_the_next_and_nothing_else(tmp_path: Path) -> None:
    living = Scratch("a-", tmp_path)
    child = os.fork()
    if child == 0:
        theirs = Scratch("a-", tmp_path)
        (theirs.path / "file").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    other, elsewhere = tmp_path / "b-1", tmp_path / "elsewhere"
    for folder in (other, elsewhere):
        folder.mkdir()
        (folder / "file").touch()
    (tmp_path / "a-link").symlink_to(elsewhere)
    (tmp_path / "a-file").touch()
    (tmp_path / ".a-new").mkdir()  # of a process that has not locked it yet
    assert len(list(tmp_path.glob("a-*"))) == 4
    with Scratch("a-", tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.name for path in tmp_path.glob("a-*")} == {living.path.name, folder.name, "a-link", "a-file"}
    assert not folder.exists() and living.path.exists()
    assert (other / "file").exists() and (elsewhere / "file").exists() and (tmp_path / ".a-new").exists()


def test_it_is_removed_also_when_the_clock_has_gone_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a-left", ".a-left"):
        (tmp_path / name).mkdir()
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real - 3600)
    with Scratch("a-", tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_what_is_kept_for_a_person_is_not_swept(tmp_path: Path) -> None:
    scratch = Scratch("a-", tmp_path)
    (scratch.path / "file").touch()
    kept = scratch.keep()
    Scratch("a-", tmp_path)
    assert (kept / "file").exists()


def test_a_forked_process_removes_nothing_of_its_parent(tmp_path: Path) -> None:
    scratch = Scratch("a-", tmp_path)
    child = os.fork()
    if child == 0:
        scratch.__exit__()
        os._exit(0)
    os.waitpid(child, 0)
    assert scratch.path.exists()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Scratch("a-", tmp_path / "missing")
