"""The words of the command line: help that fits a screen, a version, files of settings."""

from __future__ import annotations

import argparse
import io
import pydoc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stoker
from stoker.launch.cli import main, parser

SCREEN = (80, 24)


def commands(of: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from commands(command, (*words, name))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that is about the command line alone prints."""
    try:
        status = main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    output, errors = capsys.readouterr()
    assert (status, errors) == (0, ""), words
    return output


def test_help_is_printed_when_nothing_is_asked_and_when_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    top = shown(capsys, "--help")
    assert "stoker COMMAND" in top and "\n    train " in top
    assert shown(capsys) == shown(capsys, "help") == top
    assert shown(capsys, "help", "checkpoint", "diff") == shown(capsys, "checkpoint", "diff", "--help")
    assert shown(capsys, "checkpoint") == shown(capsys, "checkpoint", "--help")
    assert shown(capsys, "--version") == f"stoker {stoker.__version__}\n"


@pytest.mark.parametrize("words", list(commands(parser())), ids=" ".join)
def test_the_help_of_every_command_fits_a_screen_or_comes_in_pages(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(SCREEN[0]))
    monkeypatch.setenv("LINES", str(SCREEN[1]))
    paged: list[str] = []
    monkeypatch.setattr(pydoc, "pager", paged.append)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert not end.value.code
    [text] = paged or [terminal.getvalue()]
    lines = text.splitlines()
    assert max(map(len, lines)) <= SCREEN[0]
    assert bool(paged) == (len(lines) >= SCREEN[1])  # a line is left for the prompt
    assert words or not paged, "the list of commands is one screen"


def test_a_config_is_read_from_files_by_every_command_that_composes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("steps: 12\nlaunch.device: cpu\n")
    (tmp_path / "groups" / "model").mkdir(parents=True)
    (tmp_path / "groups" / "model" / "mine.yaml").write_text("num_hidden_layers: 3\n")
    words = ("--config", "mine.yaml", "model=mine", "--config-dir", "groups", "batch.size=16")
    text = shown(capsys, "config", *words)
    assert "steps: 12\n" in text and "num_hidden_layers: 3\n" in text and "  size: 16\n" in text
    assert "steps=12" in shown(capsys, "submit", "--dry-run", "launch=slurm", "run.dir=a", *words)
    (tmp_path / "mine.yaml").write_text("step: 12\n")
    for command in (("train",), ("check",), ("data", "plan"), ("data", "prepare")):
        assert main([*command, *words]) == 2
        assert capsys.readouterr().err == "stoker: mine.yaml, line 1: unknown key 'step': did you mean 'steps'?\n"
