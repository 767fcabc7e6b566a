"""`stoker config --layout`: what it prints, read back, is the layout."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.launch.cli import main
from stoker.launch.layout import lines_of, ranks_in_words
from stoker.parallel.layout import AXES, BatchPlan, Layout
from tests.parallel.test_layout import LAYOUTS

Printed = Callable[..., tuple[int, list[str]]]
PLAN = BatchPlan(rows=64, rank_rows=16, micro_rows=4)


def read_back(words: str) -> list[int]:
    if "-" in words:
        first, last = map(int, words.split("-"))
        return list(range(first, last + 1))
    if "..." in words:
        first, second, last = (int(word) for word in words.split(",") if word != "...")
        return list(range(first, last + 1, second - first))
    return [int(word) for word in words.split(",")]


def sections(lines: list[str]) -> dict[str, list[str]]:
    """The part of each axis, its head first."""
    parts = [part.splitlines() for part in "\n".join(lines).split("\n\n")[2:]]
    return {part[0].partition(":")[0]: part for part in parts}


def groups_in(lines: list[str]) -> list[list[int]]:
    """The groups in the lines below a head, without the places (`pp 0`) on their left."""
    return [read_back(words) for line in lines for words in re.sub(r"[a-z_]+ \d+", "", line).split()]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([5], "5"),
        (range(8), "0-7"),
        ([6, 7], "6-7"),
        ([0, 8], "0,8"),
        ([1, 9, 17], "1,9,17"),
        (range(0, 64, 8), "0,8,...,56"),
        ([0, 8, 16, 24], "0,8,...,24"),
    ],
)
def test_ranks_at_equal_distances_take_few_characters(ranks, words):
    assert ranks_in_words(list(ranks)) == words
    assert read_back(words) == list(ranks)


@given(LAYOUTS, st.integers(1, 200))
def test_every_group_of_every_axis_is_printed_once_and_in_order(layout, width):
    found = sections(list(lines_of(layout, PLAN, width)))
    assert list(found) == list(AXES)
    for axis, (head, *lines) in found.items():
        if getattr(layout, axis) == 1:
            assert head == f"{axis}: no groups, size 1" and not lines
        else:
            assert groups_in(lines) == layout.groups(axis)


def test_a_line_shows_the_place_of_its_groups():
    layout = Layout(dp_replicate=2, dp_shard=3, tp=4, pp=12, zero=3)
    found = sections(list(lines_of(layout, PLAN, 120)))
    assert found["tp"][0] == "tp: 72 groups of 4, stride 1; along a line, dp_shard from 0 to 2"
    assert found["tp"][1] == "  pp 0   dp_replicate 0  0-3      4-7      8-11"
    for line in found["tp"][1:]:
        _, pp, _, replica, *groups = line.split()
        for shard, group in enumerate(groups):
            at = layout.coordinate(read_back(group)[0])
            assert (at.pp, at.dp_replicate, at.dp_shard, at.tp) == (int(pp), int(replica), shard, 0)
    assert found["pp"][1].split()[-4:] == ["0,24,...,264", "1,25,...,265", "2,26,...,266", "3,27,...,267"]


def test_groups_that_do_not_fit_on_a_line_continue_below():
    narrow = sections(list(lines_of(Layout(dp_replicate=2, dp_shard=4, tp=2), PLAN, 34)))
    assert narrow["tp"][1:] == [
        "  dp_replicate 0  0-1    2-3",
        "                  4-5    6-7",
        "  dp_replicate 1  8-9    10-11",
        "                  12-13  14-15",
    ]


def test_the_head_has_the_sizes_and_the_rows():
    head = list(lines_of(Layout(2, 64, 8, 16, zero=3), BatchPlan(4096, 32, 2), 120))[:9]
    assert head[0] == "16,384 ranks: pp 16 x dp_replicate 2 x dp_shard 64 x tp 8, ZeRO 3, fsdp"
    assert head[1] == "4,096 rows a step over 128 data-parallel ranks: 32 each, in 16 micro-batches of 2 rows"
    assert [line.split()[:4] for line in head[4:]] == [
        ["pp", "16", "1,024", "1,024"],
        ["dp_replicate", "2", "512", "8,192"],
        ["dp_shard", "64", "8", "256"],
        ["cp", "1", "8", "16,384"],
        ["tp", "8", "1", "2,048"],
    ]


def test_16384_ranks_fit_on_lines_that_a_screen_holds():
    lines = list(lines_of(Layout(2, 64, 8, 16, zero=3), PLAN, 120))
    assert max(map(len, lines)) <= 120 and len(lines) < 3000
    for axis, (_, *groups) in sections(lines).items():
        if axis != "cp":
            assert groups_in(groups) == Layout(2, 64, 8, 16).groups(axis)


@pytest.fixture
def printed(capfd: pytest.CaptureFixture[str]) -> Printed:
    """Status and lines of `stoker config --layout <words>`."""

    def run(*words: str) -> tuple[int, list[str]]:
        status = main(["config", "--layout", *words])
        return status, "".join(capfd.readouterr()).splitlines()

    return run


def test_any_number_of_ranks_can_be_shown_on_any_machine(printed):
    words = ["launch.nproc=16384", "batch.size=32768", "parallel.zero=3", "parallel.dp_replicate=16"]
    status, lines = printed(*words)
    assert status == 0, lines
    assert lines[0] == "16,384 ranks: dp_replicate 16 x dp_shard 1024, ZeRO 3, fsdp"
    assert lines[1] == "32,768 rows a step over 16,384 data-parallel ranks: 2 each, in 1 micro-batch of 2 rows"
    found = sections(lines)
    assert groups_in(found["dp_shard"][1:]) == Layout(16, 1024).groups("dp_shard")
    assert groups_in(found["dp_replicate"][1:]) == Layout(16, 1024).groups("dp_replicate")


def test_gpus_that_this_machine_lacks_are_no_reason_to_refuse(printed):
    status, lines = printed("launch.nproc=64", "launch.device=cuda", "batch.size=64")
    assert status == 0 and lines[0] == "64 ranks: dp_shard 64, ZeRO 1, fsdp", lines


def test_tensor_and_pipeline_parallel_ranks_are_where_they_should_be(printed):
    words = ["launch.nproc=16", "parallel.tp=2", "parallel.pp=2", "parallel.zero=0", "batch.micro_size=1"]
    status, lines = printed(*words)
    assert status == 0, lines
    found = sections(lines)
    assert found["tp"][1:] == ["  pp 0  0-1    2-3    4-5    6-7", "  pp 1  8-9    10-11  12-13  14-15"]
    assert groups_in(found["pp"][1:]) == [[rank, rank + 8] for rank in range(8)]
    assert groups_in(found["dp_replicate"][1:]) == Layout(4, 1, 2, 2).groups("dp_replicate")


def test_a_layout_that_is_impossible_anywhere_is_refused(printed):
    status, lines = printed("launch.nproc=16384")
    assert status == 2 and len(lines) == 1
    assert "batch.size=32 does not divide over 16384 data-parallel ranks: batch.size=16384 does" in lines[0]


def test_without_the_flag_the_config_is_printed(capsys):
    status = main(["config", "launch.nproc=2", "launch.device=cpu"])
    output = capsys.readouterr().out
    assert status == 0 and output.startswith("run:\n") and "axis" not in output


def test_expert_groups_are_printed_behind_the_axes():
    layout = Layout(dp_shard=4, tp=2, zero=3, ep=2)
    found = sections(list(lines_of(layout, PLAN, 100)))
    assert groups_in(found["ep"][1:]) == layout.expert_groups() == [[0, 2], [4, 6], [1, 3], [5, 7]]
