"""The code blocks of README and docs: the files that they hold, and the commands with the output printed below them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROMPT = "$ "
# bash itself takes a command line apart; these programs only note the words that they were started with.
_PROGRAMS = "\n".join(
    f"{name}() {{ printf '%s\\0' {name} \"$@\" $'\\n' >> \"$CALLS\"; }}" for name in ("stoker", "torchrun")
)


@dataclass(frozen=True)
class Command:
    """A command line of a page and the lines printed below it."""

    text: str
    output: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A fenced or indented block."""

    page: Path
    heading: str  # of the section
    line: int  # of its first line in the page, from 1
    language: str  # "" if none is given
    file: str  # the name behind the language: ```yaml conf/mine.yaml
    lines: tuple[str, ...]
    mark: str  # the text of the HTML comment in the lines above it, or ""

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def commands(self) -> list[Command]:
        """The command lines, behind a `$`, and the output of each. A comment (#) above a command is no output."""
        found: list[tuple[list[str], list[str]]] = []
        continued = False
        for line in self.lines:
            if continued:
                found[-1][0].append(line)
            elif line.startswith(PROMPT):
                found.append(([line.removeprefix(PROMPT)], []))
            elif found:
                found[-1][1].append(line)
            continued = line.endswith("\\") and (continued or line.startswith(PROMPT))
        for _, output in found[:-1]:
            while output and output[-1].startswith("# "):
                output.pop()
        return [Command("\n".join(text), tuple(output)) for text, output in found]


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found, heading, at = [], "", 0
    while at < len(lines):
        begin, line = at, lines[at]
        at += 1
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("```"):
            while lines[at] != "```":
                at += 1
            language, _, file = line.removeprefix("```").partition(" ")
            found.append(_block(page, heading, begin, lines, language, file, lines[begin + 1 : at]))
            at += 1
        elif line.startswith("    ") and not lines[begin - 1].strip():
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            inner = "\n".join(lines[begin:at]).rstrip().splitlines()
            found.append(_block(page, heading, begin - 1, lines, "", "", [line[4:] for line in inner]))
    return found


def _block(page: Path, heading: str, above: int, lines: list[str], language: str, file: str, inner: list[str]) -> Block:
    before = "\n".join(lines[:above]).rstrip()
    comment = re.search(r"<!--((?:(?!-->).)*)-->\Z", before, re.DOTALL)
    return Block(
        page, heading, above + 2, language, file, tuple(inner), " ".join(comment[1].split()) if comment else ""
    )


def started_by(text: str, folder: Path) -> tuple[list[list[str]], str]:
    """What bash does with a command line of a page.

    The words of every `stoker` and `torchrun` that it starts, in order, and the output of all other programs.
    """
    with tempfile.NamedTemporaryFile() as calls:
        shown = subprocess.run(
            ["bash", "--noprofile", "--norc", "-c", f"{_PROGRAMS}\n{text}"],
            cwd=folder, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "CALLS": calls.name},
        ).stdout  # fmt: skip
        records = Path(calls.name).read_text().split("\n\0")
    return [record.split("\0")[:-1] for record in records if record], shown
