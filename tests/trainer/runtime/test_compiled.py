"""A start that was killed while it compiled leaves nothing that a later start would load."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.compiled import remove_unfinished_builds
from tests.launch.runs import overrides, train_here, write_text

COMPILE = """
import torch
print(torch.compile(lambda x: (x * 2 + 1).sin())(torch.ones(8))[0].item(), flush=True)
"""


def unfinished(folder: Path) -> Path:
    """As a compiler leaves it that was killed while it wrote."""
    (folder / "ab" / "abc.main_CxxBuild").mkdir(parents=True)
    for name in ("abc.main.cpp", "abc.main.so", "abd.main.so"):
        (folder / "ab" / name).write_bytes(b"")
    return folder / "ab" / "abc.main.so"


def test_an_unfinished_build_is_removed_and_others_stay(tmp_path: Path) -> None:
    library = unfinished(tmp_path)
    assert remove_unfinished_builds(tmp_path) == [library]
    assert sorted(path.name for path in library.parent.iterdir()) == ["abc.main.cpp", "abd.main.so"]
    assert remove_unfinished_builds(tmp_path) == []


def test_a_build_that_goes_on_stays(tmp_path: Path) -> None:
    library = unfinished(tmp_path)
    (tmp_path / "locks").mkdir()
    with (tmp_path / "locks" / "abc.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert remove_unfinished_builds(tmp_path) == []
    assert library.exists() and remove_unfinished_builds(tmp_path) == [library]


@pytest.mark.long
def test_a_kernel_compiles_after_a_killed_compiler(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    words = [sys.executable, "-P", "-c", COMPILE]
    process = subprocess.Popen(words, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("*/*main_CxxBuild")) and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    [working] = tmp_path.glob("*/*main_CxxBuild")
    library = working.with_name(f"{working.name.removesuffix('_CxxBuild')}.so")
    library.write_bytes(b"")  # the compiler opens it near its end
    assert subprocess.run(words, env=environment, capture_output=True, check=False).returncode != 0
    assert library in remove_unfinished_builds(tmp_path)
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("0.14112")


@pytest.mark.long
def test_a_run_that_compiles_removes_them_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = unfinished(tmp_path / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    write_text(tmp_path / "text")
    words = overrides(tmp_path / "run", tmp_path / "text", "steps=1", "launch.nproc=1", "compile=true")
    train_here(tmp_path, words)
    assert not library.exists()
    assert f"removed {library}" in RunDirectory(tmp_path / "run").log(1, 0).read_text()
