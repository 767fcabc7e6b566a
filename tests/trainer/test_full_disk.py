"""A disk that is full for a while: its file is named, the run follows `checkpoint.on_error`, and nothing is lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from stoker.checkpoint import newest
from stoker.conf import durable
from stoker.conf.durable import is_full, with_room, write_durably, write_whole
from stoker.conf.rundir import RunDirectory, next_attempt
from stoker.trainer.failure import Attempt, fail
from stoker.trainer.report.metrics import read
from stoker.trainer.runtime.outcome import Ending, Outcome, read_ending, write_ending
from stoker.trainer.runtime.process import Console, Phase, Phases, Place, read_stamps
from tests import world
from tests.launch.runs import environment, steps_of, train_here, write_text
from tests.trainer.lives import words_of

NO_ROOM = os.strerror(errno.ENOSPC)


class Disk:
    """Full from a step's line on, for so many refused writes of any file."""

    def __init__(self, refusals: int, from_line: int) -> None:
        self.left, self._from, self._lines = refusals, from_line, 0
        self._write, self._pwrite, self._open_own = os.write, os.pwrite, durable.open_own
        os.write, os.pwrite = self.write, self.pwrite  # type: ignore[assignment]
        durable.open_own = self.open_own

    def _refuse(self, counted: bool = True) -> None:
        if self._lines >= self._from and self.left > 0:
            self.left -= counted
            raise OSError(errno.ENOSPC, NO_ROOM)

    def write(self, file: int, data: Any) -> int:
        if "metrics.jsonl" in os.readlink(f"/proc/self/fd/{file}"):
            self._lines += 1
            self._refuse()
        return self._write(file, data)

    def pwrite(self, *arguments: Any) -> int:
        self._refuse(counted=False)
        return self._pwrite(*arguments)

    def open_own(self, path: Path, flags: int) -> int:
        if flags & os.O_TRUNC:
            self._refuse(counted=path.name.startswith("state.json"))  # once a save
        return self._open_own(path, flags)


def trained_on(variables: dict[str, str], words: list[str], refusals: int, screen: str) -> tuple[str, str]:
    import torch.distributed as dist

    dist.destroy_process_group()  # tests/world.py made one; a user's process has none
    import stoker

    os.environ |= variables
    os.dup2(os.open(screen, os.O_WRONLY | os.O_CREAT), 1)
    Disk(refusals, from_line=5)
    ending = stoker.run(words)
    return ending.outcome.value, ending.message


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    write_text(folder / "text")
    return folder


def run_on(home: Path, name: str, refusals: int, *more: str) -> tuple[RunDirectory, tuple[str, str], str]:
    words = words_of(home / name, home / "text", "steps=12", "checkpoint.every=4", "log.progress=plain", *more)
    screen = home / f"{name}.txt"
    [ended] = world.run(trained_on, 1, environment(home), words, refusals, str(screen), fresh=True)
    return RunDirectory(home / name), ended, screen.read_text()


def test_a_run_continues_while_its_disk_is_full_and_loses_no_step(home: Path) -> None:
    train_here(home, words_of(home / "whole", home / "text", "steps=12"))
    run, ended, screen = run_on(home, "filled", refusals=6)
    assert ended[0] == "completed" and steps_of(run.path) == steps_of(home / "whole")
    assert f"{run.metrics}: {NO_ROOM}: lines of metrics wait in memory until there is room" in screen
    assert f"{run.metrics}: there is room again, and every line is written" in screen
    assert (
        f"checkpoint of step 8 failed: rank 0: {run.metrics}: {NO_ROOM}" in screen or "checkpoint of step 8" in screen
    )
    assert newest(run.checkpoints)[0].name == "step-00000012"
    assert read_ending(run, 1) is not None


def test_a_disk_that_is_full_at_the_end_is_waited_for(home: Path) -> None:
    run, ended, _ = run_on(home, "late", refusals=11)
    assert ended[0] == "completed" and [step[0] for step in steps_of(run.path)] == list(range(1, 13))
    assert newest(run.checkpoints)[0].name == "step-00000012"


def test_with_on_error_fail_the_run_ends_and_names_the_file(home: Path) -> None:
    run, (outcome, message), _ = run_on(home, "failing", 4, "checkpoint.on_error=fail")
    assert outcome == "failed" and NO_ROOM in message and str(run.metrics) in message, message
    assert "(checkpoint.on_error=fail; saved at step" in message
    step = read(run.metrics)[-1]["step"]
    assert newest(run.checkpoints)[0].name == f"step-{step:08d}", "what was computed until then is not lost"


def test_an_outcome_is_written_when_there_is_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, waits, told = RunDirectory(tmp_path), [], []
    number = next_attempt(run)
    real = durable.open_own
    monkeypatch.setattr("stoker.trainer.runtime.outcome.open_own", _full_for(3, real))
    monkeypatch.setattr("time.sleep", waits.append)
    assert write_ending(run, number, Ending(Outcome.FAILED, "why"), waiting=told.append)
    ending = read_ending(run, number)
    assert ending is not None and ending.message == "why" and len(waits) == 3
    assert len(told) == 1 and NO_ROOM in told[0] and f"attempts/{number}" in told[0]


def _full_for(times: int, real: Any) -> Any:
    left = [times]

    def open_own(path: Path, flags: int) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, NO_ROOM, str(path))
        return real(path, flags)

    return open_own


def test_a_rank_that_fails_on_a_full_disk_is_restarted_and_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before the first step, and where not even the outcome can be written."""
    run = RunDirectory(tmp_path)
    attempt = Attempt(run, next_attempt(run), Place(0, 1, 0, 1, 0), met=True)
    error = OSError(errno.ENOSPC, NO_ROOM, str(run.config))
    assert fail(error, attempt, attempt.place, Console()) == 1
    ending = read_ending(run, attempt.number)
    assert ending is not None and ending.retry and ending.message == f"{run.config}: {NO_ROOM}"
    later = Attempt(run, next_attempt(run), attempt.place, met=True)
    monkeypatch.setattr("stoker.trainer.runtime.outcome.open_own", _full_for(10**6, durable.open_own))
    monkeypatch.setattr("stoker.trainer.runtime.outcome.ROOM_SECONDS", 0.0)
    monkeypatch.setattr("stoker.conf.durable._POLL_SECONDS", 0.0)
    monkeypatch.setattr("time.monotonic", iter(range(0, 10**6, 50)).__next__)
    assert fail(error, later, later.place, Console()) == 1
    said = capsys.readouterr().err
    assert f"rank 0 failed: {run.config}: {NO_ROOM}" in said and "how this attempt ended is not kept" in said
    assert read_ending(run, later.number) is None


def test_stamps_and_seconds_that_find_no_room_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stoker.trainer.report.goodput import Booking

    phase = Phases(tmp_path / "rank-0.stamp")
    booking = Booking(tmp_path / "seconds.json", phase, 0)

    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, NO_ROOM)

    monkeypatch.setattr("os.pwrite", refuse)
    monkeypatch.setattr("stoker.conf.durable.open_own", refuse)
    phase(1, Phase.UPDATE)
    booking.write()
    monkeypatch.undo()
    assert read_stamps(tmp_path)[0].phase == Phase.START
    phase(1, Phase.UPDATE)
    booking.write()
    assert read_stamps(tmp_path)[0].phase == Phase.UPDATE

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.pwrite", broken)
    with pytest.raises(OSError, match=r"rank-0\.stamp"):
        phase(2, Phase.UPDATE)


@pytest.mark.parametrize("write", [write_durably, write_whole])
def test_a_file_that_does_not_fit_is_named_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    path = tmp_path / "config.yaml"
    write(path, b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, NO_ROOM)

    monkeypatch.setattr("stoker.conf.durable.open", lambda *_: _Refusing(*_), raising=False)
    with pytest.raises(OSError, match=NO_ROOM) as refused:
        write(path, b"new")
    assert refused.value.filename == str(path) and is_full(refused.value)
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


class _Refusing:
    """A file on a full disk."""

    def __init__(self, descriptor: int, _mode: str) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> _Refusing:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, NO_ROOM)


def test_only_a_full_disk_is_waited_for_and_only_for_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(code: int) -> Any:
        def act() -> None:
            raise OSError(code, os.strerror(code))

        return act

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(OSError, match="Permission denied"):
        with_room(raising(errno.EACCES), 1e9)
    told: list[str] = []
    with pytest.raises(OSError, match=NO_ROOM):
        with_room(raising(errno.ENOSPC), 0.05, told.append)
    assert len(told) == 1
    wrapped = RuntimeError("the writer failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert is_full(wrapped) and not is_full(RuntimeError("x"))
