from __future__ import annotations

import gzip
import json
import random

import pytest

from stoker.conf.schema import DataConfig
from stoker.data import jsonl as jsonl_module
from stoker.data import open_rows, prepare
from stoker.data.documents import Collection, open_source
from stoker.data.manifest import parts_of
from stoker.data.tokenizer import ByteTokenizer
from tests.data.counted import base

TEXTS = [f"{n} " + "\u00fc" * random.Random(n).randrange(30) for n in range(40)]
LINES = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]


def config_of(path, **args):
    return DataConfig(
        target="stoker.data.text:open_source", path=str(path), args=args, cache=str(path.parent / "cache")
    )


def read(path, **args) -> list[str]:
    return [text for part in parts_of(open_source(config_of(path, **args))) for _, text, _ in part.texts()]


@pytest.mark.parametrize("end", ["\n", ""], ids=["closed by a line end", "without a last line end"])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_every_line_is_a_document_in_order_compressed_or_not(tmp_path, suffix, end):
    content = ("\n\n".join(LINES) + end).encode()  # blank lines are no documents
    if suffix.endswith("gz"):
        content = gzip.compress(content, mtime=0)
    if suffix.endswith("zst"):
        import zstandard

        content = zstandard.compress(content[:200]) + zstandard.compress(content[200:])  # frames may follow each other
    (tmp_path / f"a.{suffix}").write_bytes(content)
    assert read(tmp_path / f"a.{suffix}") == TEXTS


@pytest.mark.parametrize("size", range(1, 60, 7))
def test_a_file_read_in_ranges_gives_each_line_once_wherever_it_is_cut(tmp_path, monkeypatch, size):
    (tmp_path / "a.jsonl").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    monkeypatch.setattr(jsonl_module, "_RANGE_BYTES", size)
    assert len(open_source(config_of(tmp_path / "a.jsonl"))) > 10
    assert read(tmp_path / "a.jsonl") == TEXTS


def test_a_folder_may_hold_both_kinds_of_files(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a whole file")
    (tmp_path / "texts" / "b.jsonl").write_text('{"body": "a line"}\n')
    assert read(tmp_path / "texts", text="body") == ["a whole file", "a line"]


def test_ranges_of_a_file_are_read_by_name_of_its_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    (collection,) = open_source(config_of(tmp_path / "a.jsonl"))
    assert isinstance(collection, Collection)
    with pytest.raises(ValueError, match=r"a.jsonl \(line at byte 16\): its 'text' is int, not str"):
        list(collection.read())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": ', r"a.jsonl \(line at byte 16\): not JSON: Expecting value"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a.jsonl \(line at byte 0\): not UTF-8: byte 0xe9 at offset 13"),
        ("a.jsonl", b"[1]\n", r"a.jsonl \(element 0\): it is int, not an object"),
        ("a.jsonl", b'{"txt": "x"}\n', r"it has no 'text', only 'txt'"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "one"}\n' * 99, mtime=0)[:-9],
            r"cannot read .*a.jsonl.gz after line 99",
        ),
        ("a.jsonl.gz", b"no gzip", r"a.jsonl.gz is named as a file of gzip and does not begin as one"),
        ("a.jsonl.zst", b"no zstd at all", r"a.jsonl.zst is named as a file of zstd and does not"),
        ("a.jsonl", b"\n\n", "holds any text"),
    ],
)
def test_what_cannot_be_read_is_one_error_that_names_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    config = base(tmp_path, target="stoker.data.text:open_source", path=str(tmp_path / name))
    with pytest.raises(ValueError, match=message):
        prepare(config)


def test_a_zstd_file_cut_short_is_an_error_and_no_shorter_epoch(tmp_path):
    import zstandard

    content = zstandard.compress(("\n".join(LINES) * 50).encode())
    (tmp_path / "a.jsonl.zst").write_bytes(content[:-7])
    with pytest.raises(ValueError, match=r"a.jsonl.zst"):
        read(tmp_path / "a.jsonl.zst")


def test_another_key_of_the_same_lines_is_another_source(tmp_path, monkeypatch):
    monkeypatch.setattr("stoker.data.documents._FRESH_SECONDS", -1.0)
    (tmp_path / "a.jsonl").write_text('{"a": "first", "b": "second"}\n' * 20)
    config = base(
        tmp_path, target="stoker.data.text:open_source", path=str(tmp_path / "a.jsonl"), validation=0.0, seq_len=4
    )
    for key, text in (("a", "first"), ("b", "second"), ("a", "first")):
        config.data.args = {"text": key}
        assert ByteTokenizer().decode(open_rows(config, "train").tokens.ids[:]) == text * 20


def test_lines_become_tokens(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(LINES), encoding="utf-8")
    config = base(tmp_path, target="stoker.data.text:open_source", path=str(tmp_path / "a.jsonl"), validation=0.0)
    tokens = open_rows(config, "train").tokens
    assert len(tokens.starts) == 40
    assert ByteTokenizer().decode(tokens.ids[:]) == "".join(TEXTS)
