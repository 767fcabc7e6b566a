"""README and docs: every setting, file, link, command and option that they name exists, and no page is long."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
from pathlib import Path

import pytest

from stoker.conf.files import EXPERIMENT
from stoker.conf.schema import GROUPS, kinds
from stoker.launch.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST = 200  # lines, of a page that is written by hand
PRINTED = "refusals.md"  # by the code: as long as its table
FREE = (
    "data.args.",
    "model.args.",
    "objective.args.",
    "optim.args.",
    "parallel.deepspeed.",
)  # keys below these are the user's
OTHERS = {
    "key",
    "experiment",
    "last_call_timeout",
    "streaming",
    "weights_only",
}  # not keys: placeholders, options of other programs
METRICS = {"data.bytes"}
EXAMPLES = {"conf/model/mine.yaml", "conf/tracker/text.yaml"}  # of files that users make
SECTIONS = sorted({key.partition(".")[0] for key in kinds() if "." in key})

LINK = re.compile(r"\]\(([^)\s]+)\)")
SETTING = re.compile(r"(?<![\w./$=\-(:])([a-z_]+(?:\.[a-z_0-9]+)*)=(?=[\w'\"\[{/~.@-])")
KEY = re.compile(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_0-9]+(?:\.[a-z_0-9]+)*)(?:=[^`]*)?`")
FILE = re.compile(r"`((?:launch|trainer|checkpoint|models|data|parallel|conf|tests|benchmarks|docs)/[\w/.-]+\.\w+)`")
REFUSED = re.compile(r"unknown key '([\w.]+)'")  # what a page shows the answer to
PROGRAM = re.compile(r"(?:python|-m) ((?:benchmarks/|stoker\.|benchmarks\.)[\w./]+)")
COMMAND = re.compile(r"(?:^|[`$ (])stoker ((?:checkpoint |data )?[a-z]+)\b([^`\n|)]*)", re.MULTILINE)
BENCHMARK = re.compile(r"python (?:-m )?(benchmarks[/.]\w+)(?:\.py)?([^`\n]*)")
OPTION = re.compile(r"(?<!\S)(--[a-z-]+)")


def code_of(text: str) -> str:
    """Command lines of a page's blocks, without outputs, and its code spans."""
    blocks = re.findall(r"^```(?!python)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^    [^\n]*\n)+", text, re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return "\n".join([*(line for line in lines if re.match(r"\s*(\$ )?(stoker|torchrun) ", line)), *spans_of(text)])


def spans_of(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def unknown_settings(text: str) -> set[str]:
    keys, found = kinds(), set(SETTING.findall(code_of(text))) | set(KEY.findall(text))
    found -= {*keys, *GROUPS, EXPERIMENT, *OTHERS, *METRICS, *REFUSED.findall(text)}
    return {
        key
        for key in found
        if not key.startswith(FREE)
        and not any(known.startswith(f"{key}.") for known in keys)  # a section
        and not key.endswith((".weight", ".safetensors", ".json"))  # Hugging Face's tensors and files
    }


def missing_files(page: Path, text: str) -> set[str]:
    links = {link for link in LINK.findall(text) if "://" not in link}
    found = {link for link in links if not (page.parent / link.partition("#")[0]).exists() and not link.startswith("#")}
    for link in links:
        target, _, anchor = link.partition("#")
        if anchor and link not in found:
            headings = re.findall(r"^#+ (.*)$", (page.parent / target if target else page).read_text(), re.MULTILINE)
            if anchor not in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}:
                found.add(link)
    found |= {file for file in {*FILE.findall(text)} - EXAMPLES if not (ROOT / file).exists()}
    return found | {program for program in PROGRAM.findall(text) if not _exists(program)}


def unknown_benchmark_options(text: str) -> set[str]:
    """Options of benchmarks, by their sources: `--help` would import torch."""
    found = set()
    for name, rest in BENCHMARK.findall(text):
        source = (ROOT / f"{name.replace('.', '/')}.py").read_text()
        found |= {f"{name} {option}" for option in OPTION.findall(rest) if f'"{option}"' not in source}
    return found


def _exists(program: str) -> bool:
    if program.endswith(".py"):
        return (ROOT / program).exists()
    return importlib.util.find_spec(program) is not None


@functools.cache
def help_of(command: str) -> str | None:
    """The --help of `stoker COMMAND`; None for an unknown command."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        try:
            main([*command.split(), "--help"])
        except SystemExit as end:
            return None if end.code else shown.getvalue()
    return shown.getvalue()


def unknown_commands(text: str) -> set[str]:
    found = set()
    for command, rest in COMMAND.findall(code_of(text)):
        shown = help_of(command)
        if shown is None:
            found.add(f"stoker {command}")
        else:
            options = (option for option in OPTION.findall(rest) if f"unrecognized arguments: {option}" not in text)
            found |= {f"stoker {command} {option}" for option in options if option not in shown}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_only_what_exists_and_is_short(page: Path) -> None:
    text = page.read_text()
    assert not unknown_settings(text)
    assert not missing_files(page, text)
    assert not unknown_commands(text)
    assert not unknown_benchmark_options(text)
    assert len(text.splitlines()) <= LONGEST or page.name == PRINTED


def test_false_facts_are_found() -> None:
    page = ROOT / "README.md"
    assert unknown_settings("    stoker train batch.rows=8 \\\n        steps=1\n") == {"batch.rows"}
    assert unknown_settings("`data.planner` and `parallel.tp=2`, `data.args.x=1`") == {"data.planner"}
    assert missing_files(
        page, "[a](docs/none.md) [b](docs/data.md#none) [c](docs/data.md#sources) `trainer/none.py`"
    ) == {
        "docs/none.md",
        "docs/data.md#none",
        "trainer/none.py",
    }
    assert missing_files(page, "    python -m stoker.none\n    python benchmarks/none.py\n") == {
        "stoker.none",
        "benchmarks/none.py",
    }
    assert unknown_benchmark_options("    python -m benchmarks.chaos --seed 1 --none\n") == {"benchmarks.chaos --none"}
    assert unknown_commands("`stoker doctor RUN`, `stoker logs RUN --rank 3 --none`") == {
        "stoker doctor",
        "stoker logs --none",
    }
