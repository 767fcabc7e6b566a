"""Keys and fingerprints: each ingredient changes them, and nothing else does."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stoker.conf.schema import BatchConfig, Config, DataConfig
from stoker.data import keys, open_rows, read_rows
from stoker.data.loader import IndexedLoader
from stoker.data.streaming.opening import open_all_streams
from stoker.data.tokenizer import ByteTokenizer, JsonTokenizer
from tests.data.conftest import WORDS, write_text, write_texts
from tests.data.counted import base, changed, conversations, write_lines

SHORT = (
    "{% for m in messages %}{% if m['role']=='assistant' %}A:{% generation %}{{ m['content'] }}{% endgeneration %}\n"
    "{% else %}Q:{{ m['content'] }}\n{% endif %}{% endfor %}"
)
LONG = SHORT.replace("A:", "### The assistant says: ").replace("Q:", "### The user asks: ")

SOURCE = keys.SourceKey("content", "tokenizer", "encoder", 0.1, "position")
WINDOWS = keys.WindowsKey({"format": "jsonl", "content": "a"}, 10, 2, 0, "byte", 0.1, "position")
EXAMPLES = (
    keys.MemoKey(1, (("a", "1"), ("b", None))),
    keys.TokensKey(1, "content", "tokenizer", 0.1, "encoder"),
    SOURCE,
    keys.RowTableKey(1, SOURCE, "train", "padded", 32),
    keys.TaughtKey(SOURCE, "train", "padded", True, 32),
    keys.IndexedFingerprint(1, "byte", "train", 0.1, "padded", True, 32, 0, (("a", SOURCE), ("b", SOURCE)), True),
    keys.SplitsKey("jsonl", "shards", "content", (("column", "text"),)),
    WINDOWS,
    keys.HeldOutKey(1, WINDOWS, 8, 32, "padded", False, "train"),
    keys.StreamedFingerprint(1, 8, 16, "padded", True, 32, (("a", WINDOWS), ("b", WINDOWS))),
    keys.BlockKey("url", 10, "version", 4, 0),
    keys.IndexKey("url", 10, "version"),
)


def others(value: Any) -> list[Any]:
    """Values that differ from `value`, in each of its parts if it has some."""
    if dataclasses.is_dataclass(value):
        return [
            dataclasses.replace(typing.cast(Any, value), **{field.name: other})
            for field in dataclasses.fields(value)
            for other in others(getattr(value, field.name))
        ]
    if isinstance(value, tuple):
        changed = [(*value[:n], other, *value[n + 1 :]) for n, one in enumerate(value) for other in others(one)]
        mixed = len(value) > 1 and all(isinstance(one, tuple) for one in value)
        return [*changed, value[::-1]] if mixed else changed
    if isinstance(value, dict):
        return [{**value, name: other} for name, one in value.items() for other in others(one)]
    if isinstance(value, bool):
        return [not value]
    return [value + 1] if isinstance(value, int | float) else [f"{value}?"]


def is_no_run(example: Any) -> bool:
    """A fingerprint of several sources that are no mixture, or that have several tokenizers: both are refused."""
    return isinstance(example, keys.IndexedFingerprint) and (
        not example.mixed or any(source.tokenizer != SOURCE.tokenizer for _, source in example.sources)
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_every_ingredient_of_every_key_changes_it(example):
    changed = [other for other in others(example) if not is_no_run(other)]
    assert len(changed) >= len(dataclasses.fields(example)) - 1
    found = [example.key, *(other.key for other in changed)]
    assert len(set(found)) == len(found)
    assert example.key == dataclasses.replace(example).key


def test_every_class_of_keys_has_an_example():
    classes = {
        value for value in vars(keys).values() if isinstance(value, type) and issubclass(value, keys._Ingredients)
    }
    assert classes - {keys._Ingredients} == {type(example) for example in EXAMPLES}


def test_no_other_module_of_data_makes_keys():
    """Tokenizers and templates have separate fingerprints, which are ingredients; shuffling draws from a hash."""
    allowed = {"keys.py", "shuffle.py", "chat.py", "chat_template.py", "tokenizer.py", "tokenizer_files.py"}
    allowed |= {"hub_tokenizer.py", "tiktoken_files.py"}
    root = Path(keys.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import) and any(alias.name == "hashlib" for alias in node.names):
                found.add(path.name)
    assert "keys.py" in found and found <= allowed, found - allowed


# ---- what users change ----


def indexed(folder: Path) -> Config:
    """A mixture of texts, conversations, tables, compressed lines and token files."""
    write_texts(folder / "texts", 20)
    write_lines(folder / "chats" / "a.jsonl", conversations(20))
    write_lines(
        folder / "lines" / "a.jsonl.gz", [{"text": f"{n} {WORDS[n % 12]}" * 4, "body": "b" * 40} for n in range(40)]
    )
    write_text(folder / "table.csv", "id,text\n" + "".join(f"{n},row {n} of a table\n" for n in range(60)))
    (folder / "template.jinja").write_text(SHORT)
    (folder / "ids").mkdir()
    (np.arange(2000) % 250).astype(np.uint16).tofile(folder / "ids" / "a.u16")
    write_text(folder / "tokenizer.json", JsonTokenizer.train(["some words of a text"], 280).json)
    sources = {
        "texts": {"kind": "text", "path": str(folder / "texts"), "weight": 1},
        "chats": {
            "kind": "chat",
            "path": str(folder / "chats"),
            "weight": 1,
            "args": {"template": str(folder / "template.jinja")},
        },
        "lines": {"kind": "text", "path": str(folder / "lines"), "weight": 1},
        "table": {"kind": "text", "path": str(folder / "table.csv"), "weight": 1},
        "ids": {"kind": "tokens", "path": str(folder / "ids"), "weight": 1, "args": {"end_of_document": 7}},
    }
    return base(folder, sources=sources, packing="padded", tokenizer=str(folder / "tokenizer.json"))


def streamed(folder: Path) -> Config:
    write_lines(
        folder / "lines" / "a.jsonl", [{"text": f"{n} {WORDS[n % 12]}" * 9, "body": "b" * 40} for n in range(60)]
    )
    write_text(folder / "tokenizer.json", JsonTokenizer.train(["some words of a text"], 280).json)
    data = DataConfig(
        target="stoker.data.text:open_source",
        splits="stoker.data.streaming.sources:open_text",
        name="lines",
        path=str(folder / "lines"),
        mode="streaming",
        streams=4,
        shuffle_window=2,
        split_bytes=1024,
        assign_every=2,
        tokenizer=str(folder / "tokenizer.json"),
        cache=str(folder / "cache"),
    )
    return Config(data=data, seq_len=16, batch=BatchConfig(size=8))


def fingerprint(config: Config) -> str:
    if config.data.mode == "indexed":
        return json.dumps(dict(open_rows(config, "train").fingerprint), sort_keys=True)
    stream, _ = open_all_streams(config, ByteTokenizer() if config.data.tokenizer == "byte" else tokenizer_of(config))
    try:
        return json.dumps(stream.fingerprint, sort_keys=True)
    finally:
        stream.close()


def tokenizer_of(config: Config) -> JsonTokenizer:
    return JsonTokenizer(Path(str(config.data.tokenizer)).read_text())


def flip(path: str) -> Callable[[Config, Path], None]:
    """Another byte in the middle of a file; its size and its time stay."""

    def spoil(config: Config, folder: Path) -> None:
        data = bytearray((folder / path).read_bytes())
        place = len(data) // 2
        while not chr(data[place]).isalnum():
            place += 1
        data[place] = ord("z") if data[place] != ord("z") else ord("y")
        stamps = (folder / path).stat()
        (folder / path).write_bytes(data)
        os.utime(folder / path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))

    return spoil


def edit_template(config: Config, folder: Path) -> None:
    (folder / "template.jinja").write_text(LONG)


def other_tokenizer(config: Config, folder: Path) -> None:
    write_text(folder / "tokenizer.json", JsonTokenizer.train(["other things to read"], 280).json)


def repack(config: Config, folder: Path) -> None:
    import gzip

    path = folder / "lines" / "a.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"stoker", b"Stoker")))


def of_source(name: str, **keys: Any) -> Callable[[Config, Path], None]:
    def change(config: Config, folder: Path) -> None:
        config.data.sources[name] = {**config.data.sources[name], **keys}

    return change


def reorder(config: Config, folder: Path) -> None:
    config.data.sources = dict(reversed(config.data.sources.items()))


def data(**keys: Any) -> Callable[[Config, Path], None]:
    def change(config: Config, folder: Path) -> None:
        config.data = dataclasses.replace(config.data, **keys)

    return change


def seed(config: Config, folder: Path) -> None:
    config.run.seed = 3


def length(config: Config, folder: Path) -> None:
    config.seq_len = 12


def index_of_megatron(config: Config, folder: Path) -> None:
    of_source("ids", args={"end_of_document": 9})(config, folder)


CHANGES = {
    "indexed": {
        "a byte of a text": flip("texts/text-003.txt"),
        "a byte of a conversation": flip("chats/a.jsonl"),
        "a byte of a table": flip("table.csv"),
        "a byte of token files": flip("ids/a.u16"),
        "compressed lines": repack,
        "the chat template": edit_template,
        "the tokenizer": other_tokenizer,
        "the key of the text": of_source("lines", args={"text": "body"}),
        "where documents end": index_of_megatron,
        "a source's validation": of_source("texts", validation=0.3),
        "the order of the sources": reorder,
        "packing": data(packing="best_fit"),
        "mask": data(document_mask=False),
        "validation": data(validation=0.2),
        "seed": seed,
        "seq_len": length,
    },
    "streamed": {
        "a byte of a shard": flip("lines/a.jsonl"),
        "the tokenizer": other_tokenizer,
        "the byte tokenizer": data(tokenizer="byte"),
        "the key of the text": data(args={"text": "body"}),
        "a user's function": data(args={"text": "text"}, splits="tests.data.test_keys:mapped"),
        "streams": data(streams=8),
        "shuffle_window": data(shuffle_window=3),
        "split_bytes": data(split_bytes=2048),
        "assign_every": data(assign_every=4),
        "packing": data(packing="best_fit"),
        "mask": data(document_mask=True),
        "validation": data(validation=0.2),
        "seed": seed,
        "seq_len": length,
    },
}
MAKE = {"indexed": indexed, "streamed": streamed}


def mapped(config: DataConfig) -> Any:
    from stoker.data.streaming.sources import open_shards
    from stoker.data.text import READS

    return open_shards(config, "*", READS, "auto", "text", "tests.data.test_keys:body_of")


def body_of(values: dict[str, Any]) -> str:
    return values["body"]


@pytest.mark.long
@pytest.mark.parametrize(("mode", "what"), [(mode, what) for mode in CHANGES for what in CHANGES[mode]])
def test_every_key_that_changes_sequences_changes_the_fingerprint(tmp_path, mode, what):
    config = MAKE[mode](tmp_path)
    before = fingerprint(config)
    assert fingerprint(config) == before
    CHANGES[mode][what](config, tmp_path)
    assert fingerprint(config) != before


@pytest.mark.parametrize("mode", MAKE)
def test_what_changes_no_sequence_changes_no_fingerprint(tmp_path, mode):
    config = MAKE[mode](tmp_path / "here")
    before = fingerprint(config)
    shutil.copytree(tmp_path / "here", tmp_path / "there", ignore=shutil.ignore_patterns("cache"))
    for path in (tmp_path / "there").rglob("*.*"):
        os.utime(path, (1, 1))
    moved = json.loads(
        json.dumps(dataclasses.asdict(config.data)).replace(str(tmp_path / "here"), str(tmp_path / "there"))
    )
    free = {"workers": 2, "prefetch": 7, "retries": 1, "stall_seconds": 9.0, "zstd_window_log": 31}
    free |= {"max_decompressed_gib": 3.0, "block_cache": str(tmp_path / "blocks"), "skip_limit": 5}
    assert fingerprint(dataclasses.replace(config, data=changed(config, **moved | free).data)) == before


# ---- the row table and the template (two runs with one cache) ----


def chat(folder: Path, template: str) -> Config:
    lines = [
        [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n} " + "x" * (n % 7)}]
        for n in range(40)
    ]
    write_lines(folder / "c.jsonl", [{"messages": messages} for messages in lines])
    (folder / "t.jinja").write_text(template)
    return base(
        folder, 128, target="stoker.data.chat:open_source", path=str(folder / "c.jsonl"), packing="best_fit",
        validation=0.0, args={"template": str(folder / "t.jinja")},
    )  # fmt: skip


def test_rows_under_a_template_are_not_cut_by_the_table_of_another(tmp_path):
    def rows(template: str) -> list[str]:
        plan = open_rows(chat(tmp_path, template), "train")
        read = read_rows(plan, range(plan.rows_per_epoch))
        return [ByteTokenizer().decode(row[row < 256].tolist()) for row in read.tokens]

    alone = rows(LONG)
    shutil.rmtree(tmp_path / "cache")
    short = rows(SHORT)
    assert rows(LONG) == alone and rows(SHORT) == short
    shutil.rmtree(tmp_path / "cache")
    assert rows(SHORT) == short


def test_a_run_does_not_resume_with_an_edited_template(tmp_path):
    stream = IndexedLoader(open_rows(chat(tmp_path, SHORT), "train"), 2)
    stream.next()
    state = json.loads(json.dumps(stream.state()))
    IndexedLoader(open_rows(chat(tmp_path, SHORT), "train"), 2).load_state(state)
    with pytest.raises(
        ValueError,
        match=r"2 rows of other data: encoder \(the chat template, .*\) was chat \w+ transformers \S+ and is chat \w+",
    ):
        IndexedLoader(open_rows(chat(tmp_path, LONG), "train"), 2).load_state(state)


def test_an_ingredient_that_an_earlier_version_did_not_record_is_for_the_user_to_decide(tmp_path, caplog):
    config = chat(tmp_path, SHORT)
    stream = IndexedLoader(open_rows(config, "train"), 2)
    stream.next()
    state = stream.state()
    del state["fingerprint"]["encoder"]
    with pytest.raises(
        ValueError,
        match=r"did not record encoder \(the chat .*\), now chat .*: if that has not changed, set run.change=true",
    ):
        IndexedLoader(open_rows(config, "train"), 2).load_state(state)
    allowed = IndexedLoader(open_rows(config, "train"), 2, change=True)
    allowed.load_state(state)
    assert allowed.row == 2 and "did not record encoder" in caplog.text


def test_an_ingredient_that_the_data_do_not_have_was_none_in_earlier_versions_too(tmp_path):
    write_texts(tmp_path / "texts", 20)
    config = base(tmp_path, target="stoker.data.text:open_source", path=str(tmp_path / "texts"))
    stream = IndexedLoader(open_rows(config, "train"), 2)
    state = stream.state()
    assert state["fingerprint"].pop("encoder") is None
    stream.load_state(state)
    state["fingerprint"]["encoder"] = "chat"
    with pytest.raises(ValueError, match=r"encoder \(.*\) was chat and is None"):
        stream.load_state(state)


def test_a_mixture_whose_source_has_ended_does_not_continue_with_more_epochs(tmp_path):
    write_texts(tmp_path / "few", 3)
    write_texts(tmp_path / "many", 60, seed=1)
    few = {"kind": "text", "path": str(tmp_path / "few"), "weight": 1, "validation": 0.0}
    many = {"kind": "text", "path": str(tmp_path / "many"), "weight": 1, "max_epochs": 9, "validation": 0.0}
    config = base(tmp_path, sources={"few": few, "many": many}, epochs=1)
    stream = IndexedLoader(open_rows(config, "train"), 24)
    for _ in range(10):
        stream.next()
    state = stream.state()
    assert state["sources"]["few"]["rows"] < 100 < state["sources"]["many"]["rows"]  # it has ended
    IndexedLoader(open_rows(config, "train"), 24).load_state(state)
    config.data.epochs = 4
    with pytest.raises(ValueError, match=r"the first 240 rows hold \d+ of few, .* set data.epochs and max_epochs back"):
        IndexedLoader(open_rows(config, "train"), 24).load_state(state)
