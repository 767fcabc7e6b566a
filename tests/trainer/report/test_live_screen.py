"""The live view on a real terminal emulator, as text: at three widths and across resizes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
from stoker.trainer.report import live
from tests.trainer.report.observed import Report, a_config, record

live.memory_bytes = lambda: 312_000_000
view = live.LiveProgress(sys.stdout)
view.start(a_config(), None, 20000, {"layout": "dp_shard 2, ZeRO 1"})
for step in range(1, 5001):
    view.step(record(step, loss=2.34561, val_loss=2.41 if step == 4000 else None))
view.checkpoint(Report(4800))
for line in range(30):
    view.message(f"message {line}")
sys.stdin.readline()
view.finish("completed", 5000)
print("the end", flush=True)
sys.stdin.readline()
"""
WIDE = """\
━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  step 5,000/20,000   eta 2h 05m
loss        2.3456           norm 0.81  lr 1.0e-3
val loss    2.4100 at step 4000
speed       2,000 tok/s      data wait 10%  memory 312 MB
checkpoint  saved step 4800 (40 MB in 0.4 s, held up 3 ms, 310 MB/s per rank)
"""
NARROW = """\
━━━━━━━━━━━━━━━━━━━━━━━━━━━  step 5,000/20,000   eta 2h 05m
loss        2.3456           norm 0.81  lr 1.0e-3
val loss    2.4100 at step 4000
speed       2,000 tok/s      data wait 10%  memory 312 MB
checkpoint  saved step 4800 (40 MB in 0.4 s, held up 3 ms,…
"""
NARROWEST = """\
step 5,000/20,000   eta 2h 05m
loss        2.3456
val loss    2.4100 at step 4000
speed       2,000 tok/s
checkpoint  saved step 4800 (40 …
"""


class Tmux:
    def __init__(self, folder: Path) -> None:
        (folder / "program.py").write_text(PROGRAM)
        self._words = ["tmux", "-f", "/dev/null", "-S", str(folder / "socket")]
        begin = f"cd {ROOT} && exec {sys.executable} {folder / 'program.py'}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
        self("new-session", "-d", "-x", "160", "-y", "24", begin, env=environment)

    def __call__(self, *words: str, **options: object) -> str:
        return subprocess.run([*self._words, *words], check=True, capture_output=True, text=True, **options).stdout  # type: ignore[call-overload,no-any-return]

    def shows(self, expected: str) -> str:
        """Waits until the screen ends like this; all that was ever on it."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            everything = self("capture-pane", "-p", "-S", "-1000").rstrip() + "\n"
            if everything.endswith(expected):
                return everything
            time.sleep(0.05)
        raise AssertionError(f"expected:\n{expected}\nfound:\n{everything}")


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    found = Tmux(tmp_path)
    yield found
    found("kill-server")


def test_the_view_fits_160_80_60_and_34_columns_and_leaves_nothing_behind_when_they_change(tmux: Tmux) -> None:
    for columns, screen in ((160, WIDE), (80, WIDE), (60, NARROW), (34, NARROWEST), (60, NARROW), (160, WIDE)):
        tmux("resize-window", "-x", str(columns), "-y", "24")
        everything = tmux.shows("message 29\n" + screen)
        assert everything.count("eta") == 1, f"a stale view at {columns} columns:\n{everything}"
    tmux("send-keys", "Enter")
    everything = tmux.shows(WIDE + "\nthe end\n")  # the terminal echoes the key
    assert [f"message {line}" in everything for line in range(30)] == [True] * 30 and everything.count("eta") == 1
