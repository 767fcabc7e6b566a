"""docs/adapt.md: each of its commands works, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch.newcomer import SMALL, Newcomer
from tests.launch.runs import write_text
from tests.models.families import write_family

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapt.md"


@pytest.mark.long
def test_the_commands_of_the_page_work(newcomer: Newcomer) -> None:
    write_family(newcomer.home / "models" / "base", "llama")
    write_text(newcomer.home / "books", 12)
    text = PAGE.read_text().replace("\\\n        ", "")
    commands = re.findall(r"^    (stoker .*)$", text, re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        status, output = newcomer.types(command, *SMALL, "steps=2", "launch.nproc=1", "precision=fp32")
        assert status == 0, f"{command}\n{output}"
    assert (newcomer.home / "out" / "merged" / "model.safetensors").exists()
    assert newcomer.config("runs/more").adapter.rank == newcomer.config("runs/lora").adapter.rank
