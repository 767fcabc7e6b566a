from __future__ import annotations

import fcntl
import io
import itertools
import math
import os
import pty
import struct
import termios
import threading
import time
from contextlib import suppress

import pytest

from stoker.conf.schema import LogConfig
from stoker.trainer.report import live, progress
from stoker.trainer.report.live import LiveProgress
from stoker.trainer.report.observers import open_progress
from stoker.trainer.report.progress import Pace, PlainProgress, duration, rate, size
from tests.trainer.report.observed import Report, a_config, record


@pytest.fixture(autouse=True)
def _fixed_memory(monkeypatch):
    monkeypatch.setattr(progress, "memory_bytes", lambda: 312_000_000)
    monkeypatch.setattr(live, "memory_bytes", lambda: 312_000_000)


def plain(every: int = 20, total_steps: int = 200, resumed_from_step: int | None = None):
    screen = io.StringIO()
    view = PlainProgress(screen, every)
    view.start(a_config(), resumed_from_step, total_steps, {"layout": "dp_shard 2, ZeRO 1"})
    screen.truncate(0)
    screen.seek(0)
    return view, screen


def test_a_plain_line_shows_the_progress_of_the_run():
    view, screen = plain()
    for step in range(1, 21):
        view.step(record(step, loss=2.34561))
    assert screen.getvalue().splitlines()[-1] == (
        "step 20/200  loss 2.3456  norm 0.81  lr 1.0e-3  2,000 tok/s  data 10%  mem 312 MB  eta 1m 30s"
    )


def test_plain_lines_come_every_so_many_steps_and_at_the_first_and_the_last():
    view, screen = plain(every=10, total_steps=25)
    for step in range(4, 26):
        view.step(record(step))
    assert [line.split()[1] for line in screen.getvalue().splitlines()] == ["4/25", "10/25", "20/25", "25/25"]


def test_a_start_shows_the_facts_and_where_it_resumes():
    screen = io.StringIO()
    PlainProgress(screen, 10).start(a_config(), 40, 200, {"layout": "dp_shard 2, ZeRO 1"})
    assert screen.getvalue() == "layout     dp_shard 2, ZeRO 1\nresumed from step 40\n"


def test_checkpoints_evaluations_and_skips_have_separate_lines():
    view, screen = plain()
    view.step(record(1))
    screen.truncate(0)
    screen.seek(0)
    view.step(record(2, val_loss=2.41023))
    view.step(record(3, skipped=True, loss=math.nan, grad_norm=math.inf))
    view.checkpoint(Report(2))
    view.checkpoint(Report(3, error="rank 1: No space left on device"))
    assert screen.getvalue().splitlines() == [
        "evaluation at step 2: val loss 2.4102",
        "step 3 skipped: loss nan, gradient norm inf; parameters unchanged",
        "checkpoint saved step 2 (40 MB in 0.4 s, held up 3 ms, 310 MB/s per rank)",
        "checkpoint of step 3 failed: rank 1: No space left on device",
    ]


def test_speed_is_of_recent_steps_and_not_of_the_first():
    pace = Pace()
    pace.add(record(1, step_seconds=60.0, tokens_per_second=1.0))
    assert pace.step_seconds == 60.0  # nothing better is known yet
    for step in range(2, 10):
        pace.add(record(step, step_seconds=1.0, tokens_per_second=100.0, data_seconds=0.25))
    assert (pace.step_seconds, pace.tokens_per_second, pace.data_share) == (1.0, 100.0, 0.25)
    for step in range(10, 10 + progress.WINDOW):
        pace.add(record(step, step_seconds=2.0, tokens_per_second=50.0, data_seconds=0.0))
    assert (pace.step_seconds, pace.tokens_per_second, pace.data_share) == (2.0, 50.0, 0.0)


def test_speed_is_tokens_over_time_not_a_mean_of_rates():
    pace = Pace()
    for step, seconds in ((1, 1.0), (2, 1.0), (3, 3.0)):
        pace.add(record(step, step_seconds=seconds, tokens_per_second=300 / seconds))
    assert pace.tokens_per_second == pytest.approx(600 / 4)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m 00s"), (80, "1m 20s"), (3599.7, "1h 00m"), (11100, "3h 05m"), (187_200, "2d 04h")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1200, "1.2 kB"), (312e6, "312 MB"), (999.9e6, "1.0 GB"), (1.25e12, "1.2 TB")],
)
def test_sizes_are_short(count, text):
    assert size(count) == text


@pytest.mark.parametrize(("lr", "text"), [(1e-3, "1.0e-3"), (2.54e-10, "2.5e-10"), (0.0, "0.0e0"), (1.0, "1.0e0")])
def test_learning_rates_are_short(lr, text):
    assert rate(lr) == text


class Terminal:
    """A pseudo-terminal of a given width, and what was written to it."""

    def __init__(self, columns: int) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        os.set_blocking(self._master, False)
        self.screen = os.fdopen(slave, "w", encoding="utf-8")
        self._shown = b""

    def close(self) -> None:
        os.close(self._master)

    def shown(self) -> str:
        with suppress(BlockingIOError):  # until there is no more for now
            while chunk := os.read(self._master, 65536):
                self._shown += chunk
        return self._shown.decode()

    def wait_for(self, text: str) -> str:
        deadline = time.monotonic() + 5
        while text not in self.shown() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert text in self.shown()
        return self.shown()


def plain_text(shown: str) -> str:
    from rich.text import Text

    return Text.from_ansi(shown.replace("\r", "")).plain


def test_progress_is_live_on_a_terminal_and_plain_elsewhere(monkeypatch):
    terminal = Terminal(100)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(open_progress(LogConfig(progress="auto"), terminal.screen), LiveProgress)
    assert isinstance(open_progress(LogConfig(progress="plain"), terminal.screen), PlainProgress)
    assert isinstance(open_progress(LogConfig(progress="auto"), io.StringIO()), PlainProgress)
    assert isinstance(open_progress(LogConfig(progress="live"), io.StringIO()), LiveProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_progress(LogConfig(progress="auto"), terminal.screen), PlainProgress)


def test_the_live_view_shows_the_newest_step_and_never_hides_the_cursor(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal(100)
    view = LiveProgress(terminal.screen)
    view.start(a_config(), None, 200, {"layout": "dp_shard 2, ZeRO 1"})
    for step in range(1, 51):
        view.step(record(step, loss=2.5, val_loss=2.625 if step == 40 else None, skipped=step == 30))
    view.saving(50)
    terminal.wait_for("saving step 50")
    view.checkpoint(Report(50, error="rank 1: No space left on device"))
    view.message("wandb is offline")
    view.finish("failed", 50)
    shown = terminal.shown()
    assert "\x1b[?25l" not in shown
    text = plain_text(shown)
    frame = text[text.rindex("━  step ") :]
    for part in ("step 50/200", "eta 1m 15s", "2.5000", "2.6250 at step 40", "2,000 tok/s", "312 MB", "1 step\n"):
        assert part in frame
    assert "of step 50 failed: rank 1" in frame
    assert "wandb is offline" in text and "step 30 skipped" in text and "layout     dp_shard 2" in text


def test_the_live_view_fits_the_terminal_it_draws_on(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal(40)
    view = LiveProgress(terminal.screen)
    view.start(a_config(), None, 200, {})
    view.step(record(1))
    view.finish("completed", 1)
    assert max(len(line) for line in plain_text(terminal.shown()).splitlines()) <= 40


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_are_left_out_where_that_is_asked_for(monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal(100)
    view = LiveProgress(terminal.screen)
    view.start(a_config(), None, 2, {})
    view.step(record(1))
    view.finish("completed", 1)
    assert ("\x1b[32m━" in terminal.shown()) is not no_color and "step 1/2" in plain_text(terminal.shown())


def test_a_terminal_that_is_closed_is_an_error_of_the_next_event_and_the_thread_ends(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal(100)
    view = LiveProgress(terminal.screen)
    view.start(a_config(), None, 10**6, {})
    terminal.close()
    with pytest.raises(OSError):
        _steps(view, seconds=30)
    assert not [thread for thread in threading.enumerate() if thread.name == "live view"]


def _steps(view, seconds):
    deadline = time.monotonic() + seconds
    for step in itertools.count(1):
        view.step(record(step))
        time.sleep(0.02)
        assert time.monotonic() < deadline


def test_the_live_view_is_redrawn_by_a_thread_and_not_by_steps(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal(100)
    view = LiveProgress(terminal.screen)
    view.start(a_config(), None, 10**6, {})
    started = time.monotonic()
    for step in range(1, 2001):
        view.step(record(step))
    frames = terminal.shown().count("eta")
    seconds = time.monotonic() - started
    view.finish("completed", 2000)
    assert frames <= 2 + 4 * seconds
