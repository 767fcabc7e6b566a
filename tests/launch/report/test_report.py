"""A report is made of every run directory, whole, damaged or hostile, and holds neither code nor addresses."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.launch.cli import main
from stoker.launch.report.experts import ExpertTokens
from stoker.launch.report.gather import gather
from stoker.launch.report.other_forms import as_json, as_markdown
from stoker.launch.report.page import page, segments
from stoker.launch.report.tables import tables
from stoker.trainer.report.goodput import BOOKS, goodput
from tests.launch.report.fabricated import SECONDS, a_run

VOID = {"meta", "br"}
HOSTILE = '"><script src=//x></script><img src=x onerror=alert(1)>\x1b[2J\u202e'


class Markup(HTMLParser):
    """The elements and attributes of a page. Raises AssertionError where they do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes |= {name for name, _ in attributes}
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_page_has_charts_a_timeline_and_tables_and_needs_no_script_or_network(tmp_path: Path) -> None:
    html = page([gather(str(a_run(tmp_path / "run").path))])
    markup = Markup(html)
    assert markup.elements["svg"] == 6  # loss, norm, rate, speed, step time, saves
    assert not markup.elements.keys() & {"script", "link", "img", "iframe", "object", "a"}
    assert not any(name.startswith("on") or name in ("src", "href") for name in markup.attributes)
    assert "http:" not in html.replace("http-equiv", "") and "url(" not in html and "@import" not in html
    shown = " ".join(markup.words)
    for words in ("Timeline of the attempts", "Where the time went", "completed at step 60", "SIGKILL", "node-1"):
        assert words in shown
    for words in ("library", "skipped", "Saves", "Whole config", "optim.lr"):
        assert words in shown


def test_text_of_a_run_directory_never_becomes_markup(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", host="h<b>ost", message=HOSTILE, source=HOSTILE, name="<i>&")
    tame = a_run(tmp_path / "tame", message="x", source="x")
    markup, expected = (Markup(page([gather(str(each.path))])) for each in (run, tame))
    assert markup.elements == expected.elements and markup.attributes == expected.attributes
    assert "<script src=//x>" in "".join(markup.words), "it is shown as text"
    assert not {"\x1b", "\u202e"} & set("".join(markup.words))
    shown = as_markdown([gather(str(run.path))])
    assert "<script" not in shown.replace("\\<script", "") and "\x1b" not in shown
    assert json.loads(as_json([gather(str(run.path))]))["runs"][0]["name"] == "<i>&"


def test_the_bars_of_an_attempt_are_the_seconds_of_the_books(tmp_path: Path) -> None:
    run = gather(str(a_run(tmp_path / "run", attempts=4).path))
    spent = goodput(RunDirectory(run.path))
    assert run.seconds == pytest.approx(spent.seconds) and run.goodput == pytest.approx(spent.share)
    for account in run.accounts:
        bars = segments(account)
        assert bars[0][1] == account.began and bars[-1][2] == pytest.approx(account.ended, abs=0.5)
        assert sum(end - begin for _, begin, end in bars) == pytest.approx(sum(SECONDS.values()), abs=0.5)
        assert all(before[2] == after[1] for before, after in pairwise(bars))
        assert len(bars) > 4 * 4, "the parts of each span"
        assert len(segments(account, least=account.ended - account.began)) < 8
    parts = [
        {book: sum(end - begin for name, begin, end in segments(account) if name == book) for book in BOOKS}
        for account in run.accounts
    ]
    lost = [part["lost"] for part in parts]
    of_steps = sum(seconds for book, seconds in SECONDS.items() if book != "startup")
    assert lost == pytest.approx([0.1 * of_steps] * 3 + [0.0]), "what came after the checkpoint that was resumed from"
    assert [account.down_before for account in run.accounts] == pytest.approx([0.0, 30.0, 30.0, 30.0])


def test_phases_of_all_ranks_are_a_table(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", steps=20)
    assert "Phases of all ranks" not in as_markdown([gather(str(run.path))])
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for step, line in enumerate(lines[:10], 1):
        line |= {"phase_forward_seconds": 0.2 + step, "phase_forward_seconds_min": 0.1, "phase_update_seconds": 1.0}
        line |= {"phase_forward_seconds_median": 0.3, "phase_forward_seconds_max": 0.7}
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [table] = [table for table in tables([gather(str(run.path))]) if table.title == "Phases of all ranks"]
    assert table.rows == [["forward", "0.1000", "0.3000", "0.7000", "10.2000"]], "those that all ranks have"


EXPERTS = {"2": [0, 5, 40, 3], "10": [12, 12, 12, 12]}


def test_tokens_of_experts_are_a_picture_of_the_newest_step_that_has_them(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", steps=20)
    without = Markup(page([gather(str(run.path))]))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    lines[4]["expert_tokens"] = {"2": [12, 12, 12, 12], "10": [48, 0, 0, 0]}
    lines[9]["expert_tokens"] = EXPERTS
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = gather(str(run.path))
    assert found.experts is not None and (found.experts.step, list(found.experts.layers)) == (10, [2, 10])
    markup = Markup(page([found]))
    assert markup.elements["svg"] == without.elements["svg"] + 1
    words = "expert 2 of layer 2 has most, 3.33 x the mean of its layer; 1 of 8 have no token"
    assert words in " ".join(markup.words)
    drawn = found.experts.draw()
    cells = {paint: path.count("M") for paint, path in re.findall(r'<path fill="(.*?)" .*? d="(.*?)"', drawn)}
    assert cells == {"var(--lost)": 1, "var(--c0)": 4, "var(--c1)": 1}, "without a token, of the last class, overloaded"
    written = json.loads(as_json([found]))["runs"][0]["expert_tokens"]
    assert written == {"step": 10, "layers": EXPERTS}


@pytest.mark.parametrize(
    "damaged",
    [{}, {"a": [1]}, {"1": [1], "2": [1, 2]}, *({"1": bad} for bad in (3, [], [-1], [True], [1.5], [1 << 70]))],
    ids=str,
)
def test_other_tokens_of_experts_than_this_version_writes_are_left_out(damaged: dict[str, object]) -> None:
    assert ExpertTokens.of({"step": 3, "expert_tokens": damaged}) is None


def test_a_picture_of_many_experts_is_a_file_of_moderate_size() -> None:
    layers = {layer: [(layer * 7 + expert * 13) % 50 for expert in range(256)] for layer in range(61)}
    drawn = ExpertTokens(1, layers).draw()
    assert drawn.count("M") == 61 * 256 and len(drawn) < 600_000 and drawn.count("<text") <= 32


@pytest.mark.long
def test_a_run_cut_at_any_byte_or_full_of_rubbish_has_a_report(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", steps=20, attempts=2)
    chance = random.Random(1)
    files = [run.metrics, run.config, run.seconds(1), run.outcome(1), run.beginning(2), run.attempt(1) / "rank-0.stamp"]
    for file in files:
        whole = file.read_bytes()
        for cut in sorted(chance.sample(range(len(whole)), 12)):
            spoiled = bytearray(whole)
            spoiled[cut] = chance.randrange(256)
            for data in (whole[:cut], bytes(spoiled), whole[cut:]):
                file.write_bytes(data)
                Markup(page([gather(str(run.path))]))
        for rubbish in ('"began": 1e308, "time": -1e308', '"began": 1, "time": 2'):
            seconds = '"seconds": {"training": 1e308, "data": 1e308}'
            file.write_text(f'{{{rubbish}, "resumed_from": 0, {seconds}, "marks": []}}')
            found = [gather(str(run.path))] * 2
            Markup(page(found))
            json.loads(as_json(found))
            as_markdown(found)
        file.write_bytes(whole)
    assert gather(str(run.path)).problems == []
    run.outcome(1).write_text("{}")
    run.config.write_text("- a list")
    damaged = gather(str(run.path))
    assert [problem.partition(":")[0] for problem in damaged.problems] == ["config", "attempt 1"]
    assert "2 parts could not be read" in page([damaged]) and "holds no config" in page([damaged])


def test_a_directory_with_nothing_in_it_but_attempts_has_a_report(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.attempts.mkdir()
    assert tmp_path.name in " ".join(Markup(page([gather(str(tmp_path))])).words)


def test_several_runs_are_overlaid_and_their_differences_named(tmp_path: Path) -> None:
    runs = [gather(str(a_run(tmp_path / name, lr=lr).path)) for name, lr in (("a", 1e-3), ("b", 3e-4), ("c", 1e-4))]
    shown = " ".join(Markup(page(runs)).words)
    assert "Config differences" in shown and "optim.lr" in shown and "0.0003" in shown
    table = as_markdown(runs)
    assert "| a | 60 |" in table and "+0.0000" in table
    found = json.loads(as_json(runs))["config_differences"]
    assert found == [{"key": "optim.lr", "kind": "maths", "values": [1e-3, 3e-4, 1e-4]}]


def test_the_command_writes_a_file_or_prints(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = a_run(tmp_path / "run")
    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out.startswith("report.html: a run, ")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert main(["report", str(run.path), "--md"]) == 0
    assert capsys.readouterr().out.startswith("# run\n")
    assert main(["report", str(run.path), "--json", "-o", "run.json"]) == 0
    stored = json.loads((tmp_path / "run.json").read_text())["runs"][0]
    assert stored["last"]["step"] == 60 and stored["seconds"]["lost"] > 0 and len(stored["curves"]["loss"]) == 60
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert main(["report", *[str(run.path)] * 25]) == 2
    assert "at most 24" in capsys.readouterr().err


@pytest.mark.long
def test_a_report_of_100_000_steps_and_20_attempts_is_small_and_quick(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", steps=100_000, attempts=20)
    began = time.process_time()
    html = page([gather(str(run.path))])
    assert time.process_time() - began < 10
    assert len(html.encode()) < 3e6
    Markup(html)
