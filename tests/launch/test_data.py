"""`stoker data`, as its user runs it."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest

from stoker.data.cache import open_folder
from stoker.data.streaming.tar_index import load
from stoker.launch.cli import main
from tests.data.counted import conversations, write_lines
from tests.launch.runs import overrides, write_text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    write_text(tmp_path / "text")
    return tmp_path / "cache" / "stoker"


def texts(tmp_path: Path, *more: str) -> list[str]:
    return ["data=text", f"data.path={tmp_path / 'text'}", "seq_len=32", "data.validation=0", *more]


def failed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["data", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("stoker: ") and error.count("\n") == 1, error
    return error


def test_prepared_token_files_are_whole_and_train_without_the_texts(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "prepare", *texts(tmp_path), "--out", str(out)]) == 0
    assert f"data=tokens data.path={out}" in capsys.readouterr().err
    for path in (tmp_path / "text").iterdir():
        path.unlink()
    assert main(["data", "plan", "data=tokens", f"data.path={out}", "seq_len=32", "steps=3", "batch.size=4"]) == 0
    planned = capsys.readouterr().out
    assert "tokens" in planned and "3 steps of 4 rows of 32 tokens, packing concatenated: 12 rows" in planned
    assert main(["data", "verify", str(out)]) == 0
    assert "whole, every byte read" in capsys.readouterr().out


def test_verify_names_the_file_that_is_not_what_was_written(tmp_path, capsys, cache):
    assert main(["data", "prepare", *texts(tmp_path, "data.packing=best_fit")]) == 0
    assert main(["data", "plan", *texts(tmp_path, "data.packing=best_fit")]) == 0
    assert main(["data", "verify"]) == 0
    assert capsys.readouterr().out.count("whole") == 2  # the tokens and the row table
    for path in (*cache.glob("*/train.tokens"), *cache.glob("table-*/begins")):
        content = bytearray(path.read_bytes())
        content[7] ^= 1
        path.write_bytes(content)
    assert main(["data", "verify"]) == 1
    shown = capsys.readouterr().out
    assert "train.tokens: its CRC-32 is" in shown and "begins: its CRC-32 is" in shown and shown.count("damaged") == 2


def test_plan_counts_what_a_run_reads_of_each_source_and_where_the_data_end(tmp_path, capsys):
    write_lines(tmp_path / "chats" / "a.jsonl", conversations(60))
    named = f"texts:{{kind:text,path:{tmp_path}/text,weight:3}},chats:{{kind:chat,path:{tmp_path}/chats,weight:1}}"
    words = [f"data.sources={{{named}}}", "data.packing=best_fit", "seq_len=64", "batch.size=8", "data.validation=0"]
    assert main(["data", "plan", *words, "steps=10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["source", "texts", "chats"]
    assert [int(line.split()[7]) for line in lines[1:3]] == [60, 20]
    assert main(["data", "plan", *words, "steps=10000", "data.epochs=1"]) == 0
    assert "the data end there: steps=10000 would need 80,000 rows" in capsys.readouterr().out


def test_shards_hold_every_training_document_once(tmp_path, capsys):
    assert main(["data", "pack", "--out", str(tmp_path / "shards"), "--megabytes", "0.02", *texts(tmp_path)]) == 0
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    assert len(shards) > 2 and len(list((tmp_path / "shards").iterdir())) == 2 * len(shards)
    for path in shards:
        index = load(Path(f"{path}.index").read_bytes(), path.stat().st_size)
        with tarfile.open(path) as archive:
            names = [Path(name).stem for name in archive.getnames()]
        assert index is not None and index.broken is None and [sample.key for sample in index.samples] == names
    found = []
    for path in shards:
        with tarfile.open(path) as archive:
            found += [archive.extractfile(member).read() for member in archive]  # type: ignore[union-attr]
    assert found == [path.read_bytes() for path in sorted((tmp_path / "text").iterdir())]
    assert f"shard-{{000000..{len(shards) - 1:06}}}.tar" in capsys.readouterr().err


def test_a_trained_tokenizer_is_one_to_train_with(tmp_path, capsys):
    assert main(["data", "tokenizer", "--out", str(tmp_path / "bpe"), "--vocab", "300", *texts(tmp_path)]) == 0
    assert (
        main(["data", "prepare", *texts(tmp_path, f"data.tokenizer={tmp_path / 'bpe'}"), "--out", f"{tmp_path}/o"]) == 0
    )
    cache = open_folder(tmp_path / "o")
    first = cache.tokenizer.decode(cache.tokens("train").ids[: cache.tokens("train").starts[1]])
    assert first == (tmp_path / "text" / "000.txt").read_text()


def test_peek_shows_what_a_step_read_and_will_read(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "attempts").mkdir(parents=True)
    from stoker.conf.compose import compose
    from stoker.conf.rundir import RunDirectory, write_config

    config = compose(overrides(run, tmp_path / "text", "data.validation=0", "data.epochs=2", "skip_steps=[[5,6]]"))
    write_config(RunDirectory(run), config)
    from stoker.data import open_rows, open_tokenizer, read_rows

    rows = read_rows(open_rows(config, "train"), range(16, 24))
    assert main(["data", "peek", str(run), "--step", "3", "--rows", "8", "--characters", "10000"]) == 0
    shown = capsys.readouterr().out
    assert "step 3: rows 16 to 23 of the run; showing 8" in shown
    for row in rows.tokens.tolist():
        text = open_tokenizer(config.data).decode(row)
        assert text.replace("\n", "") in shown.replace("\n", "") or len(text.splitlines()) > 1
    assert main(["data", "peek", str(run), "--step", "5"]) == 0
    assert "skipped by skip_steps=[[5, 6]]" in capsys.readouterr().err
    assert main(["data", "peek", str(run), "--step", "31"]) == 0
    assert (
        "step 31 is past the end: the run has steps=30; with more it would take these rows" in capsys.readouterr().err
    )
    assert "step 99999 has no rows: the data end after" in failed(capsys, "peek", str(run), "--step", "99999")


@pytest.mark.parametrize("mixed", [False, True])
def test_peek_shows_rows_of_lanes_before_and_after_the_checkpoints(tmp_path, capsys, monkeypatch, mixed):
    from stoker.conf.compose import compose
    from stoker.conf.rundir import RunDirectory, write_config
    from stoker.data import open_tokenizer
    from stoker.data.streaming.opening import open_all_streams

    run = tmp_path / "run"
    (run / "attempts").mkdir(parents=True)
    words = [
        "data.mode=streaming",
        "data.streams=4",
        "data.split_bytes=512",
        "data.shuffle_window=1",
        "data.assign_every=2",
    ]
    config = compose(overrides(run, tmp_path / "text", *words, "data.validation=0"))
    if mixed:
        path = config.data.path
        sources = {name: {"kind": "text", "path": path, "weight": n} for n, name in enumerate(("books", "notes"), 1)}
        config.data.path, config.data.splits, config.data.sources = None, None, sources
    write_config(RunDirectory(run), config)
    stream, _ = open_all_streams(config, open_tokenizer(config.data))
    batches, states = [], []
    for step in range(1, 10):
        batches.append(stream.next())
        states.append(stream.state())
        if mixed and step == 5:  # the steps before that were of other weights than the config now names
            stream.close()
            config.data.weights = {"books": 9, "notes": 1}
            write_config(RunDirectory(run), config)
            stream, _ = open_all_streams(config, open_tokenizer(config.data))
            stream.load_state(states[-1])
    stream.close()
    monkeypatch.setattr("stoker.launch.data_peek._states", lambda run: [states[2], states[6]])
    for step in (1, 3, 4, 9):
        assert main(["data", "peek", str(run), "--step", str(step), "--rows", "8", "--characters", "10000"]) == 0
        shown = capsys.readouterr().out
        assert f"step {step}: rows {8 * step - 8} to {8 * step - 1} of the run; showing 8" in shown
        for row in batches[step - 1].tokens.tolist():
            text = open_tokenizer(config.data).decode(row)
            assert text.replace("\n", "") in re.sub(r"\n\[row .*\]\n", "", shown).replace("\n", "")
        assert ("notes, tokens 0 to" in shown) == mixed


def test_mistakes_are_one_line(tmp_path, capsys):
    assert "is not a run directory" in failed(capsys, "peek", str(tmp_path), "--step", "1")
    assert "no token files there" in failed(capsys, "verify", str(tmp_path / "nowhere"))
    assert "holds something already" in failed(capsys, "prepare", *texts(tmp_path), "--out", str(tmp_path / "text"))
    assert "holds something already" in failed(capsys, "pack", "--out", str(tmp_path / "text"), *texts(tmp_path))
    assert "exists already" in failed(capsys, "tokenizer", "--out", str(tmp_path / "text"), *texts(tmp_path))
    words = ["--out", str(tmp_path / "t"), "--vocab", "3", *texts(tmp_path)]
    assert "--vocab 3: 256 bytes" in failed(capsys, "tokenizer", *words)
    assert "unknown key 'data.pth'" in failed(capsys, "plan", "data.pth=x")
    assert "data.packing=best: choose from" in failed(capsys, "plan", "data.packing=best")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "meta.json").write_text("{")
    assert "holds no sound token files" in failed(capsys, "plan", "data=tokens", f"data.path={tmp_path / 'damaged'}")


def test_what_is_left_out_is_counted_in_both_modes(tmp_path, capsys):
    values = [{"text": f"document {n} " * 9 if n % 5 else ""} for n in range(40)]
    write_lines(tmp_path / "lines" / "a.jsonl", values)
    words = ["data=text", f"data.path={tmp_path / 'lines'}", "seq_len=32", "batch.size=8", "data.validation=0"]
    assert main(["data", "plan", *words, "steps=3"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[1].split()[1:4] == ["32", "0", "8"]
    assert "text: 8 documents without text are left out" in shown and "tokens of an epoch fill no row" in shown
    assert main(["data", "verify"]) == 0
    assert "whole, every byte read; 8 documents without text left out" in capsys.readouterr().out
    assert main(["data", "verify", *words]) == 0
    assert "text: 32 documents, 0 for validation; 8 documents without text left out" in capsys.readouterr().out
    assert main(["data", "verify", *words, "data.mode=streaming"]) == 0
    assert "text: 32 documents in 1 splits, whole, every split read; 8 left out" in capsys.readouterr().out


def test_what_needs_all_documents_at_once_is_refused_for_streams_with_what_reads_them(tmp_path, capsys):
    streamed = "data.mode=streaming"
    assert "stoker data verify with the same keys" in failed(capsys, "plan", *texts(tmp_path, "batch.size=8", streamed))
    shards = ["data=webdataset", f"data.urls={tmp_path}/a.tar"]
    assert "stoker data verify with the same keys" in failed(capsys, "plan", *shards)
    for command in ("prepare", "pack", "tokenizer"):
        out = [] if command == "prepare" else ["--out", str(tmp_path / f"{command}-out")]
        assert "stoker train reads it as it is, and stoker data verify" in failed(capsys, command, *shards, *out)
    assert "set data.mode=streaming" in failed(capsys, "plan", *shards, "data.mode=indexed")


def test_verify_of_a_streamed_source_names_what_is_damaged(tmp_path, capsys):
    write_lines(tmp_path / "lines" / "a.jsonl", [{"text": "a text"}, {"body": "none"}, {"text": "another"}])
    words = ["data=text", f"data.path={tmp_path / 'lines'}", "seq_len=32", "batch.size=8", "data.mode=streaming"]
    assert main(["data", "verify", *words]) == 1
    shown = capsys.readouterr().out
    assert "2 documents in 1 splits, 1 damaged" in shown and "no column 'text': it has body" in shown
