from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.trainer.report.metrics import MetricsFile, read, read_recent
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


def test_resuming_cuts_the_file_back_so_that_no_step_stands_twice(tmp_path):
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


def test_a_crash_while_cutting_back_leaves_the_old_file_whole(tmp_path, monkeypatch):
    metrics = opened(tmp_path / "m")
    for step in range(1, 4):
        metrics.step(record(step))
    before = (tmp_path / "m").read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path / "m", resumed_from_step=1)
    assert (tmp_path / "m").read_bytes() == before


def test_a_full_disk_is_an_error_and_leaves_a_readable_file(tmp_path):
    metrics = opened(tmp_path / "m")
    metrics.step(record(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "m").stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            metrics.step(record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "m").read_bytes().count(b'"step"') == 2  # it did tear the line
    assert steps(tmp_path / "m") == [1]


def test_flush_returns_after_the_disk_has_the_steps(tmp_path, monkeypatch):
    metrics = opened(tmp_path / "m")
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(os.fstat(file).st_ino))
    metrics.step(record(1))
    assert synced == []
    metrics.flush()
    assert synced == [(tmp_path / "m").stat().st_ino]


def test_after_kill_9_in_mid_run_every_step_stands_once(tmp_path):
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
    deadline = time.monotonic() + 20
    while len(read(tmp_path / "m")) < 50 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = steps(tmp_path / "m")
    assert reached == list(range(1, len(reached) + 1)) and len(reached) >= 50
    metrics = opened(tmp_path / "m", resumed_from_step=40)
    for step in range(41, 61):
        metrics.step(record(step))
    assert steps(tmp_path / "m") == list(range(1, 61))
