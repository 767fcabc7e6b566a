"""Run directories of strangers: whatever their files hold, commands end in lines, quickly, and send no sequences."""

from __future__ import annotations

import io
import json
import logging
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from stoker.conf.compose import compose
from stoker.conf.identity import identify
from stoker.conf.rundir import RunDirectory, next_attempt
from stoker.launch.cli import main
from stoker.launch.slurm.batch import write_note
from stoker.trainer.report.live import LiveProgress
from stoker.trainer.report.metrics import cut_back, last_step, steps
from stoker.trainer.report.progress import PlainProgress
from stoker.trainer.report.summary import MOST_POINTS, History, summarize
from stoker.trainer.runtime.outcome import (
    Beginning,
    Ending,
    Outcome,
    close_dead_attempts,
    write_beginning,
    write_ending,
)
from stoker.trainer.runtime.process import Console, Phase, Phases
from tests.launch.runs import write_text

STEP = {"step": 1, "updates": 1, "loss": 2.0, "grad_norm": 1.0, "lr": 0.1, "tokens": 9, "tokens_per_second": 3.0}
STEP |= {"step_seconds": 0.5, "data_seconds": 0.0, "skipped": False}
SEQUENCE = "\x1b]0;owned\x07\x1b[2J\x9b1m\u202e\r"

CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "deep JSON": b"[" * 20_000 + b"]" * 20_000 + b"\n",
    "deep object": b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"\n",
    "a list": b"[1]\n",
    "a number": b"1e999\n",
    "bytes": bytes(range(256)),
    "sequences": json.dumps({"outcome": "failed", "message": SEQUENCE, "step": 1}).encode() + b"\n",
    "markup": json.dumps({"outcome": "failed", "message": "[/nothing] [bold", "step": 1}).encode() + b"\n",
    "numbers too large": json.dumps(STEP | {"step": 10**400, "tokens": 10**30, "time": 10**300}).encode() + b"\n",
    "no numbers": json.dumps(STEP | {"loss": "x", "step_seconds": [], "time": {}, "message": 1}).encode() + b"\n",
    "not finite": b'{"step":1,"loss":NaN,"step_seconds":Infinity,"time":1e999,"began":-1e999}\n',
    "missing keys": b'{"step":1}\n',
    "stamp of nonsense": b"x y z 1 2 3\n",
    "stamp of the future": b"7 update 1e308 99999999999999999999 host 1\n",
    "aliases": b"a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n",
    "a date that is none": b"steps: 2026-99-99\n",
}
FILES: dict[str, Callable[[RunDirectory], Path]] = {
    "outcome": lambda run: run.outcome(1),
    "beginning": lambda run: run.beginning(1),
    "seconds": lambda run: run.seconds(1),
    "stamp": lambda run: run.attempt(1) / "rank-0.stamp",
    "metrics": lambda run: run.metrics,
    "config": lambda run: run.config,
    "identity": lambda run: run.identity,
    "notes": lambda run: run.slurm / "jobs.jsonl",
    "log": lambda run: run.log(1, 0),
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.config.write_text("steps: 200\n")  # a whole one takes a tenth of a second to read
    identify(run)
    number = next_attempt(run)
    run.slurm.mkdir()
    write_note(run, "7", "submit", "why")
    write_beginning(run, number, Beginning(time.time(), 0, 1, "host"))
    Phases(run.attempt(number) / "rank-0.stamp")(1, Phase.UPDATE)
    write_ending(run, number, Ending(Outcome.STOPPED, "stopped", 1))
    run.metrics.write_text(json.dumps(STEP) + "\n")
    run.log(1, 0).write_text("a line\n")
    return run


@pytest.mark.long
@pytest.mark.parametrize("file", FILES)
def test_no_content_of_a_file_ends_a_command_in_a_traceback_or_is_sent_to_the_terminal(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    path = FILES[file](run)
    for name, content in CONTENTS.items():
        path.write_bytes(content)
        for command in (["status", str(run.path)], *([["logs", str(run.path)]] if file == "log" else [])):
            began = time.process_time()
            status = main(command)
            shown = capsys.readouterr()
            assert status in (0, 1, 2) and "Traceback" not in shown.err, (name, command)
            assert not set("\x1b\x07\x9b\u202e\r") & set(shown.out + shown.err), (name, command)
            assert len(shown.err.splitlines()) <= 3 and time.process_time() - began < 5, (name, command)
        list(steps(run.metrics))
        last_step(run.metrics)
        summarize(run.path, compose([]), "completed")  # as at the end of a run


@pytest.mark.parametrize("name", ["deep JSON", "numbers too large", "no numbers", "not finite"])
def test_a_line_that_no_run_writes_is_no_step(run: RunDirectory, name: str) -> None:
    with run.metrics.open("ab") as file:
        file.write(CONTENTS[name])
    assert list(steps(run.metrics)) == [STEP] and last_step(run.metrics) == 1


def test_an_outcome_is_shown_as_it_is_written_with_its_sequences_as_text(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    run.outcome(1).write_text(json.dumps({"outcome": "failed", "message": f"[bold]{SEQUENCE}[/x]", "step": 1}))
    assert main(["status", str(run.path)]) == 1
    assert r"[bold]\x1b]0;owned\x07\x1b[2J\x9b1m\u202e\x0d[/x]" in capsys.readouterr().out


@pytest.mark.long
def test_a_thousand_attempts_are_one_table(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(999):
        number = next_attempt(run)
        write_ending(run, number, Ending(Outcome.FAILED, f"message {number}", number, retry=True))
        run.seconds(number).write_text(json.dumps({"began": 1.0, "time": 2.0, "resumed_from": 0, "seconds": {}}))
    began = time.process_time()
    assert main(["status", str(run.path)]) == 1
    close_dead_attempts(run, 1001)
    assert time.process_time() - began < 10.0
    assert "message 1000" in capsys.readouterr().out


@pytest.mark.parametrize("lines", ["0", "2", "3", "1000"])
def test_the_last_lines_of_a_log_are_shown_and_never_one_that_is_being_written(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], lines: str
) -> None:
    written = [f"{number} {'x' * 40_000}" for number in range(5)]
    run.log(1, 0).write_text("".join(f"{line}\n" for line in written) + "half a li")
    assert main(["logs", str(run.path), "--lines", lines]) == 0
    assert capsys.readouterr().out.splitlines() == (written[-int(lines) :] if int(lines) else written)


@pytest.mark.long
def test_a_long_history_is_read_in_memory_that_does_not_grow_with_it(run: RunDirectory) -> None:
    count = 3 * MOST_POINTS
    with run.metrics.open("w") as file:
        for number in range(1, count + 1):
            file.write(json.dumps(STEP | {"step": number, "skipped": number % 2 == 0, "val_loss": 1.0}) + "\n")
        file.write("x" * (8 << 20))  # a torn line longer than any
    assert main(["status", str(run.path)]) == 0  # what it imports is imported
    tracemalloc.start()
    history = History(steps(run.metrics))
    held = tracemalloc.get_traced_memory()[1]
    assert history.last is not None and history.last["step"] == count and history.skipped == count // 2
    assert MOST_POINTS // 2 <= len(history.losses.items) <= MOST_POINTS
    assert history.losses.items[:2] == [(1, 2.0), (5, 2.0)], "every fourth step"
    assert held < 24 << 20, "a list of the steps takes 60 MiB"
    tracemalloc.reset_peak()
    cut_back(run.metrics, count - 10)
    assert last_step(run.metrics) == count - 10
    assert tracemalloc.get_traced_memory()[1] < 24 << 20
    run.log(1, 0).write_bytes(run.metrics.read_bytes())
    for words in (["status"], ["logs", "--lines", "5"]):
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        assert main([words[0], str(run.path), *words[1:]]) == 0
        assert tracemalloc.get_traced_memory()[1] - before < 24 << 20, words
    tracemalloc.stop()


def test_what_a_rank_prints_of_names_and_messages_of_files_is_sent_to_no_terminal_raw() -> None:
    console, screen, live = Console(), io.StringIO(), io.StringIO()
    console.errors = io.StringIO()
    console.say(f"a file {SEQUENCE}")
    with console.echoing_warnings():
        logging.getLogger("stoker.x").warning("damaged: %s", SEQUENCE)
    PlainProgress(screen, 1).message(SEQUENCE)
    LiveProgress(live).message(SEQUENCE)
    for shown in (console.errors.getvalue(), screen.getvalue(), live.getvalue()):
        assert r"\x1b]0;owned\x07" in shown and not set("\x1b\x07\x9b\u202e\r") & set(shown)
    assert len(console.errors.getvalue().splitlines()) == 2


def test_names_of_sources_and_documents_are_shown_as_they_are_and_not_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_text(tmp_path / "text", 12)
    theirs = {"data": {"name": "[bold]\x1b[2J", "path": str(tmp_path / "text")}}
    (tmp_path / "theirs.yaml").write_text(json.dumps(theirs))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "torn\x1b[2J.jsonl").write_text("{")
    commands = {
        ("plan", "data=text", "--config", str(tmp_path / "theirs.yaml"), "batch.size=4", "seq_len=16"): 0,
        ("verify", "data=text", f"data.path={tmp_path / 'theirs'}"): 2,
    }
    for words, status in commands.items():
        assert main(["data", *words]) == status
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err and r"\x1b[2J" in shown.out + shown.err, words
