from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stoker.conf.schema import Config
from tests.launch.newcomer import Newcomer
from tests.launch.runs import launch_forked, write_text


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs of a file of tests, with a text to train on in text/."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder / "text")
    return folder


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Newcomer:
    def launch(config: Config, ranks: int, say: object, *arguments: str) -> int:
        status, output = launch_forked(tmp_path, config, ranks, *arguments)
        sys.stdout.write(output)
        return status

    for module in ("local", "check"):
        monkeypatch.setattr(f"stoker.launch.{module}.launch", launch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return Newcomer(tmp_path)
