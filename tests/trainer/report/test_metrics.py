from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.trainer.report.metrics import MetricsFile, cut_back, last_step, read, read_recent
from tests.trainer.report.observed import a_config, record


def opened(path: Path, resumed_from_step: int | None = None) -> MetricsFile:
    metrics = MetricsFile(path)
    metrics.start(a_config(), resumed_from_step, 200, {})
    return metrics


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read(path)]


def test_a_line_holds_what_other_tools_depend_on(tmp_path):
    metrics = opened(tmp_path / "m")
    metrics.step(record(1, val_loss=2.5, extra={"loss_scale": 65536.0}))
    metrics.step(record(2))
    first, second = read(tmp_path / "m")
    expected = ["step", "updates", "loss", "grad_norm", "lr", "tokens", "tokens_per_second"]
    expected += ["step_seconds", "data_seconds", "skipped"]
    assert list(second) == expected
    assert list(first) == [*expected, "val_loss", "loss_scale"]
    assert first["val_loss"] == 2.5 and first["loss_scale"] == 65536.0 and first["skipped"] is False


def test_tokens_of_experts_are_an_object_by_layer(tmp_path):
    metrics = opened(tmp_path / "m")
    many = {layer: [1_000_000 + expert for expert in range(256)] for layer in range(3, 61)}
    metrics.step(record(1, expert_tokens={2: [3, 0], 10: [1, 2]}))
    metrics.step(record(2, expert_tokens=many))
    first, second = read(tmp_path / "m")
    assert first["expert_tokens"] == {"2": [3, 0], "10": [1, 2]}
    assert second["expert_tokens"]["60"] == many[60], "a line that readers of the file take"
    assert last_step(tmp_path / "m") == 2


def test_a_step_is_in_the_file_when_step_returns(tmp_path):
    metrics = opened(tmp_path / "m")
    metrics.step(record(1))
    assert steps(tmp_path / "m") == [1]


def test_the_recent_ones_are_whole_lines_and_the_last_ones(tmp_path, monkeypatch):
    assert read_recent(tmp_path / "m") == []
    metrics = opened(tmp_path / "m")
    for step in range(1, 41):
        metrics.step(record(step))
    assert read_recent(tmp_path / "m") == read(tmp_path / "m")
    monkeypatch.setattr("stoker.trainer.report.metrics._RECENT_BYTES", 2000)
    recent = [line["step"] for line in read_recent(tmp_path / "m")]
    assert recent == list(range(41 - len(recent), 41)) and 3 < len(recent) < 20


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back_bitwise(loss, grad_norm):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m"
        metrics = opened(path)
        metrics.step(record(1, loss=loss, grad_norm=grad_norm))
        metrics.finish("completed", 1)
        (line,) = read(path)
    assert (line["loss"].hex(), line["grad_norm"].hex()) == (loss.hex(), grad_norm.hex())


def test_numbers_that_are_not_finite_are_null_and_named_in_valid_json(tmp_path):
    metrics = opened(tmp_path / "m")
    metrics.step(record(1, loss=math.nan, grad_norm=math.inf, skipped=True))

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / "m").read_text(), parse_constant=refuse)
    assert line["loss"] is None and line["grad_norm"] is None
    assert line["nonfinite"] == ["loss", "grad_norm"]


def test_resuming_truncates_the_file_so_that_no_step_occurs_twice(tmp_path):
    first = opened(tmp_path / "m")
    for step in range(1, 8):
        first.step(record(step))
    with open(tmp_path / "m", "ab") as file:
        file.write(b'{"step": 8, "los')  # killed while appending
    second = opened(tmp_path / "m", resumed_from_step=5)
    assert steps(tmp_path / "m") == [1, 2, 3, 4, 5]
    second.step(record(6, loss=0.5))
    assert steps(tmp_path / "m") == [1, 2, 3, 4, 5, 6]
    assert read(tmp_path / "m")[-1]["loss"] == 0.5


def test_a_torn_line_is_cut_off_even_when_no_step_is(tmp_path):
    first = opened(tmp_path / "m")
    first.step(record(1))
    with open(tmp_path / "m", "ab") as file:
        file.write(b'{"step": 2')
    opened(tmp_path / "m", resumed_from_step=1).step(record(2))
    assert steps(tmp_path / "m") == [1, 2]


def test_a_whole_line_that_lost_its_newline_is_torn_too(tmp_path):
    first = opened(tmp_path / "m")
    first.step(record(1))
    os.truncate(tmp_path / "m", (tmp_path / "m").stat().st_size - 1)
    opened(tmp_path / "m", resumed_from_step=1).step(record(2))
    assert steps(tmp_path / "m") == [2]


def test_a_run_killed_before_its_first_checkpoint_starts_with_an_empty_file(tmp_path):
    opened(tmp_path / "m").step(record(1))
    opened(tmp_path / "m", resumed_from_step=None)
    assert steps(tmp_path / "m") == []


class FullDisk:
    """While `full`, refuses what is written to files; `room` bytes are taken first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int = 0) -> None:
        self.full, self.room, write = True, room, os.write

        def refusing(file: int, data: bytes) -> int:
            if not self.full:
                return write(file, data)
            taken, self.room = min(self.room, len(data)), 0
            if not taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(file, bytes(data[:taken]))

        monkeypatch.setattr("os.write", refusing)


@pytest.mark.parametrize("room", [0, 1, 20])
def test_lines_that_a_full_disk_refuses_follow_when_there_is_room(tmp_path, monkeypatch, room):
    metrics = opened(tmp_path / "m")
    metrics.step(record(1))
    disk = FullDisk(monkeypatch, room)
    for step in (2, 3, 4):
        metrics.step(record(step))
        assert metrics.failure == f"{tmp_path / 'm'}: No space left on device"
    assert steps(tmp_path / "m") == [1]
    with pytest.raises(OSError, match="No space left") as refused:
        metrics.flush()  # no checkpoint commits before its metrics are there
    assert refused.value.filename == str(tmp_path / "m")
    disk.full = False
    metrics.step(record(5))
    assert metrics.failure is None and steps(tmp_path / "m") == [1, 2, 3, 4, 5]


def test_the_end_waits_for_room(tmp_path, monkeypatch):
    metrics = opened(tmp_path / "m")
    disk = FullDisk(monkeypatch, room=7)
    metrics.step(record(1))
    monkeypatch.setattr("time.sleep", lambda seconds: setattr(disk, "full", False))
    metrics.finish("completed", 1)
    assert steps(tmp_path / "m") == [1]


def test_a_rollback_drops_lines_that_wait(tmp_path, monkeypatch):
    metrics = opened(tmp_path / "m")
    disk = FullDisk(monkeypatch)
    for step in (1, 2, 3):
        metrics.step(record(step))
    disk.full = False
    metrics.rolled_back(1)
    metrics.step(record(2, loss=0.5))
    assert steps(tmp_path / "m") == [1, 2] and read(tmp_path / "m")[-1]["loss"] == 0.5


def test_memory_for_lines_that_wait_is_bounded_and_other_errors_are_not_waited_for(tmp_path, monkeypatch):
    metrics = opened(tmp_path / "m")
    FullDisk(monkeypatch)
    metrics.step(record(1))
    monkeypatch.setattr("stoker.trainer.report.metrics._MOST_WAITING_BYTES", 10)
    with pytest.raises(OSError, match="No space left"):
        metrics.step(record(2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.undo()
    metrics = opened(tmp_path / "n")
    metrics.step(record(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "n").stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as refused:
            metrics.step(record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.filename == str(tmp_path / "n")
    assert (tmp_path / "n").read_bytes().count(b'"step"') == 2  # it did tear the line
    assert steps(tmp_path / "n") == [1]


def test_cutting_back_needs_neither_room_nor_memory(tmp_path, monkeypatch):
    """In place: of a long file only what is dropped is read."""
    line = b'{"step": %d, "filling": "' + b"x" * 1000 + b'"}\n'
    (tmp_path / "m").write_bytes(b"".join(line % step for step in range(1, 3001)) + b'{"step": 3001, "fil')
    inode = (tmp_path / "m").stat().st_ino
    FullDisk(monkeypatch)
    tracemalloc.start()
    assert last_step(tmp_path / "m") == 3000
    cut_back(tmp_path / "m", 2990)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert steps(tmp_path / "m") == list(range(1, 2991)) and (tmp_path / "m").stat().st_ino == inode
    cut_back(tmp_path / "m", 0)
    assert (tmp_path / "m").read_bytes() == b"" and last_step(tmp_path / "m") == 0 == last_step(tmp_path / "none")


RUBBISH = [b'{"step": 1}\n', b"\n", b"{}\n", b'{"step": "x"}\n', b"[1]\n", b"\xff\n"]


@given(st.lists(st.sampled_from(RUBBISH), max_size=5))
def test_lines_that_are_no_steps_are_passed_over_from_the_end(rubbish):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        path.write_bytes(b'{"step": 1}\n' + b"".join(rubbish) + b'{"step": 7, "los')
        assert last_step(path) == 1
        cut_back(path, 1)
        assert not path.read_bytes().endswith(b"los") and steps(path)[-1] == 1


def test_flush_returns_after_the_disk_has_the_steps(tmp_path, monkeypatch):
    metrics = opened(tmp_path / "m")
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(os.fstat(file).st_ino))
    metrics.step(record(1))
    assert synced == []
    metrics.flush()
    assert synced == [(tmp_path / "m").stat().st_ino]


def test_after_kill_9_in_mid_run_every_step_occurs_once(tmp_path):
    program = f"""
from pathlib import Path
from tests.trainer.report.observed import a_config, record
from stoker.trainer.report.metrics import MetricsFile
metrics = MetricsFile(Path({str(tmp_path / "m")!r}))
metrics.start(a_config(), None, 10**9, {{}})
for step in range(1, 10**9):
    metrics.step(record(step))
"""
    process = subprocess.Popen([sys.executable, "-P", "-c", program], env={**os.environ, "PYTHONPATH": os.getcwd()})
    try:
        deadline, written = time.monotonic() + 20, b""
        while written.count(b"\n") < 60 and time.monotonic() < deadline:
            time.sleep(0.02)
            written = (tmp_path / "m").read_bytes() if (tmp_path / "m").exists() else b""
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    reached = steps(tmp_path / "m")
    assert reached == list(range(1, len(reached) + 1)) and len(reached) >= 50
    metrics = opened(tmp_path / "m", resumed_from_step=40)
    for step in range(41, 61):
        metrics.step(record(step))
    assert steps(tmp_path / "m") == list(range(1, 61))
