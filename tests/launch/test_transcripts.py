"""The output that README and docs print is what their commands print."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.extent import some
from tests.launch.newcomer import Newcomer
from tests.pages import PAGES, ROOT, Block, blocks
from tests.transcripts import GAP, difference, is_compared, is_long, is_replayed, same, unclear, varies

REPLAYED = {page: [block for block in blocks(page) if is_replayed(block)] for page in PAGES}


def pages(long: bool) -> list[Path]:
    return [page for page, found in REPLAYED.items() if any(is_long(block) is long for block in found)]


def replay(newcomer: Newcomer, page: Path, long: bool) -> None:
    """The blocks of a page follow one another in one folder, which has the docs of the project."""
    shutil.copytree(ROOT / "docs", newcomer.home / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    problems = []
    for block in (block for block in REPLAYED[page] if is_long(block) is long):
        for command in block.commands():
            status, output = newcomer.types(command.text)
            if command.output and is_compared(block):
                problem = difference(command.output, output.splitlines(), varies(block))
            else:
                problem = f"the status is {status}" if status else None
            if problem:
                problems.append(f"{block.place}: $ {command.text}\n{problem}\n--- all that was seen:\n{output}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", pages(long=False), ids=lambda page: page.name)
def test_a_page_prints_what_is_seen(page: Path, newcomer: Newcomer) -> None:
    replay(newcomer, page, long=False)


@pytest.mark.long
@pytest.mark.parametrize("page", some(pages(long=True), 3), ids=lambda page: page.name)
def test_a_page_prints_what_is_seen_in_a_minute(page: Path, newcomer: Newcomer) -> None:
    replay(newcomer, page, long=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_is_left_out_without_a_reason(page: Path) -> None:
    found = {block.place: problem for block in blocks(page) if (problem := unclear(block))}
    assert not found


def a_block(*lines: str, mark: str = "", language: str = "") -> Block:
    return Block(Path("a.md"), "", 1, language, "", lines, mark)


def test_what_is_unclear_is_found() -> None:
    assert unclear(a_block("loss 3.2"))
    assert unclear(a_block("stoker train", "loss 3.2"))
    assert unclear(a_block("loss 3.2", mark="long"))
    assert unclear(a_block("loss 3.2", mark="replay: long"))
    assert not unclear(a_block("loss 3.2", mark="not replayed: it needs a cluster"))
    assert not unclear(a_block("stoker train \\", "    steps=3", "torchrun x"))
    assert not unclear(a_block("$ stoker train", "loss 3.2"))


@pytest.mark.parametrize(
    ("printed", "seen", "equal"),
    [
        ("step 1/60  loss 5.8753  1,659 tok/s  data 0% eta 2m 26s", "step 1/60 loss 5.87 9 tok/s data 7% eta 4s", True),
        ("step 1/60  loss 5.8753", "step 2/60  loss 5.8753", False),
        ("loss 5.8753", "loss 5.7", False),
        ("tokens 245,760", "tokens 245,761", False),
        ("saved step 20 (37 MB in 0.1 s, held up 1 ms)", "saved step 20 (3.8 kB in 2 s, held up 0 ms)", True),
        ("checkpoint saved step 20", "checkpoint saved step 40", False),
        ("loss  step 4  4.09883  4.09883  5.8e-08  1e-05  same", "loss  step 4  4.1  4.1  1.2e-07  1e-05  same", True),
        ("differs by 5.8e-08", "differs by 0.1", False),
        ("in /home/ada/runs/a", "in /tmp/x-1/runs/a", True),
        ("changed: parallel.zero: 1 -> 0", "changed: parallel.zero: 1 -> 2", False),
    ],
)  # fmt: skip
def test_all_but_speed_time_size_path_and_rounding_is_compared(printed: str, seen: str, equal: bool) -> None:
    assert same(printed, seen) is equal


def test_lines_that_are_left_out_are_where_the_page_says() -> None:
    seen = ["a", "b", "c", "d", "e"]
    for good in (seen, ["a", GAP, "c", GAP, "e"], [GAP, "b", "c", GAP], [GAP, "d", "e"], ["a", GAP]):
        assert difference(good, seen) is None, good
    for bad in (["a", "c"], seen[:4], ["b", GAP], [GAP, "d"], [GAP, "c", "b", GAP], ["a", GAP, "x", GAP, "e"]):
        assert difference(bad, seen) is not None, bad
    assert difference(["step 4"], ["step 5"], r"step \d") is None
