from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.runs import write_text


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs of a file of tests, with a text to train on in text/."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder / "text")
    return folder
