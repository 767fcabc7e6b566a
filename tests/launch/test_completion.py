"""Completion: what can follow a line, and that a real bash offers it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from stoker.conf.schema import GROUPS, leaves
from stoker.launch.cli import main, parser
from stoker.launch.completion import candidates, script


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for run in ("runs/first", "runs/second", "alone"):
        (tmp_path / run / "attempts").mkdir(parents=True)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").touch()
    (tmp_path / "conf" / "experiment").mkdir()
    (tmp_path / "conf" / "experiment" / "big.yaml").touch()
    (tmp_path / "books").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("stoker tr", "train"),
        ("stoker checkpoint ver", "verify"),
        ("stoker help checkpoint d", "diff"),
        ("stoker train --con", "--config --config-dir"),
        ("stoker train mod", "model. model="),
        ("stoker train steps=3 optim.b", "optim.betas="),
        ("stoker train model.rope_parameters.f", "model.rope_parameters.factor="),
        ("stoker train model=m", "model=mine"),
        ("stoker train optim=", "optim=adamw optim=lamb optim=lion optim=muon optim=sgd"),
        ("stoker train exp", "experiment="),
        ("stoker train +experiment=", "+experiment=big"),
        ("stoker train compile=", "compile=false compile=true"),
        ("stoker train checkpoint.mode=a", "checkpoint.mode=async"),
        ("stoker train run.dir=", "run.dir=alone run.dir=runs/first run.dir=runs/second"),
        ("stoker train data.path=", ""),  # files: the shell's own
        ("stoker train --config ", ""),
        ("stoker status ", "alone runs/first runs/second"),
        ("stoker status runs/f", "runs/first"),
        ("stoker export alone out --dtype ", "bf16 fp16 fp32"),
        ("stoker export alone --dtype bf16 o", ""),
        ("stoker logs --lines 3 al", "alone"),
        ("stoker completion ", "bash fish zsh"),
    ],
)
def test_what_can_follow_a_line(line: str, found: str) -> None:
    assert " ".join(candidates(parser(), line)) == found


def test_every_key_and_group_can_be_typed_by_completing_section_by_section() -> None:
    open_ends, keys = [""], set()
    while open_ends:
        for found in candidates(parser(), f"stoker config {open_ends.pop()}"):
            (open_ends.append if found.endswith(".") else keys.add)(found)
    assert {f"{key}=" for key, _, _ in leaves()} | {f"{group}=" for group in GROUPS} <= keys


def test_the_scripts_ask_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert capsys.readouterr().out == script(shell) and "completion --line" in script(shell)
    assert main(["completion", "--line", "stoker data "]) == 0
    assert capsys.readouterr().out.split() == ["pack", "peek", "plan", "prepare", "tokenizer", "verify"]


@pytest.mark.parametrize("shell", ["bash", pytest.param("zsh", marks=pytest.mark.long)])
def test_a_shell_completes_what_is_typed(shell: str, folder: Path) -> None:
    program, environment = _shell(shell, folder)
    begin = {
        "bash": [["--noprofile", "--norc", "-i"], 'eval "$(stoker completion bash)"'],
        "zsh": [["-f", "-i"], 'autoload -U compinit; compinit -u; eval "$(stoker completion zsh)"'],
    }[shell]
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 400, 0, 0))  # no line is scrolled
    process = subprocess.Popen(
        [program, *begin[0]],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )
    os.close(slave)
    try:
        _type(master, f"{begin[1]}; echo rea''dy\n", "ready")
        _type(master, "stoker train checkpoint.mo\tas\t", "checkpoint.mode=async ")
        _type(master, "run.dir=runs/f\t", "run.dir=runs/first ")
        _type(master, "data.path=boo\t", "data.path=books")
        os.write(master, b"\x15exit\n")
        process.wait(10)
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.mark.long
def test_fish_completes_what_is_typed(folder: Path) -> None:
    program, environment = _shell("fish", folder)
    ask = (
        "stoker completion fish | source; complete -C 'stoker train checkpoint.mode=a'; complete -C 'stoker status ru'"
    )
    ended = subprocess.run(
        [program, "--no-config", "-c", ask], env=environment, cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout.split() == ["checkpoint.mode=async", "runs/first", "runs/second"], ended


def _shell(name: str, folder: Path) -> tuple[str, dict[str, str]]:
    """The program, and an environment that has a command `stoker`."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    stoker = folder / "bin" / "stoker"
    stoker.parent.mkdir()
    stoker.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m stoker.launch.cli "$@"\n')
    stoker.chmod(0o755)
    return program, {"PATH": f"{stoker.parent}:{os.environ['PATH']}", "TERM": "dumb", "HOME": str(folder)}


def _type(terminal: int, keys: str, awaited: str) -> None:
    """Waits until `awaited` is on the screen. Raises AssertionError with what is there after half a minute."""
    os.write(terminal, keys.encode())
    seen, deadline = "", time.monotonic() + 30
    while awaited not in seen.replace("\r", "") and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 65536).decode(errors="replace")
    assert awaited in seen.replace("\r", ""), seen
