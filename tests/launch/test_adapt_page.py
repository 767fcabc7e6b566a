"""docs/adapt.md: each of its commands works, one after the other."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from stoker.launch import evaluate, local, teach
from tests.launch.newcomer import SMALL, Newcomer
from tests.launch.runs import write_text
from tests.models.families import write_family
from tests.pages import Block, blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapt.md"
FIRST_HOUR = "A first hour"
HERE = ["launch.nproc=1", "launch.device=cpu", "launch.threads=1"]


def commands(found: list[Block]) -> list[str]:
    """The command lines of indented blocks, each on one line."""
    text = "".join(block.text for block in found if not block.language)
    return text.replace("\\\n    ", "").splitlines()


@pytest.mark.long
def test_the_commands_of_the_first_hour_work(
    newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lm_eval", "peft"):
        pytest.importorskip(name)
    for module in (evaluate, teach):
        monkeypatch.setattr(module, "launch", local.launch)  # with forked ranks
    monkeypatch.setenv("HF_DATASETS_CACHE", str(newcomer.home / "datasets"))
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    found = [block for block in blocks(PAGE) if block.heading == FIRST_HOUR]
    newcomer.write(found)
    printed: dict[str, str] = {}
    for command in commands(found):
        program, *words = command.split()
        if program == "python":
            capsys.readouterr()
            runpy.run_path(str(newcomer.home / words[0]), run_name="__main__")
            printed[words[0]] = capsys.readouterr().out
            continue
        if words[0] == "teach" or words[0] == "eval":
            command = " ".join([command, *HERE])
        status, printed[" ".join(words[:2])] = newcomer.types(command, *HERE)
        assert status == 0, f"{command}\n{printed[' '.join(words[:2])]}"
    assert printed["generate runs/chat"] == "Rhine.\n"
    assert printed["with_peft.py"] == "Rhine.\n" * 2
    assert re.search(r"\|names\|.*\|acc\W+1\|", printed["eval runs/chat"]), printed["eval runs/chat"]
    for run, share in (("runs/chat", 0.2), ("runs/student", 0.9)):
        first, *_, last = (step["loss"] for step in newcomer.steps(run))
        assert last < share * first, run
    assert "peft" in sys.modules


@pytest.mark.long
def test_the_commands_of_the_page_work(newcomer: Newcomer) -> None:
    write_family(newcomer.home / "models" / "base", "llama")
    write_text(newcomer.home / "books", 12)
    found = commands([block for block in blocks(PAGE) if block.heading != FIRST_HOUR])
    assert len(found) == 6
    for command in found:
        status, output = newcomer.types(command, *SMALL, "steps=2", "launch.nproc=1", "precision=fp32")
        assert status == 0, f"{command}\n{output}"
    assert (newcomer.home / "out" / "merged" / "model.safetensors").exists()
    assert newcomer.config("runs/more").adapter.rank == newcomer.config("runs/lora").adapter.rank
