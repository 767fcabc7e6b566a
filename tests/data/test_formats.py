"""Which format a file has, for every source and in both modes: by what is in it, and then by its name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from stoker.conf.schema import DataConfig
from stoker.conf.targets import import_target
from stoker.data.documents import documents_of, open_source
from stoker.data.formats import CHOICES, FORMATS
from stoker.data.manifest import parts_of
from stoker.data.remote import refuse
from stoker.data.streaming.sources import open_shards, open_store
from stoker.data.text import READS

TEXTS = [f"text of document {n}" for n in range(20)]
OBJECTS = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(value) + "\n" for value in OBJECTS).encode()
CSV = b"id,text\n" + b"".join(b"%d,text of document %d\n" % (n, n) for n in range(20))

Read = Callable[..., list[str]]


def indexed(path: Path, **data: object) -> list[str]:
    # type: ignore[arg-type]
    config = DataConfig(target="stoker.data.text:open_source", name="text", path=str(path), **data)
    return [text for part in parts_of(open_source(config)) for _, text, _ in part.texts()]


def streamed(path: Path, **data: object) -> list[str]:
    target = "stoker.data.streaming.sources:open_text"
    cache = str((path if path.is_dir() else path.parent).parent / "cache")
    # type: ignore[arg-type]
    config = DataConfig(splits=target, name="text", path=str(path), split_bytes=512, cache=cache, **data)
    found, store = import_target(target)(config), open_store(config)
    return [
        str(content) for split in range(len(found)) for _, content in found.read(split, store, refuse) if len(content)
    ]


@pytest.fixture(params=[indexed, streamed])
def read(request) -> Read:
    """Reads the texts of a file or folder by `data=text`, in one mode."""
    return request.param


def zstd(data: bytes, window_log: int = 10) -> bytes:
    """A stream that names its window: what `cat FILE | zstd --long=N` writes."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, compression_level=1)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(data) + stream.flush()


def tables(folder: Path) -> dict[str, bytes]:
    """The same rows in each format of tables."""
    table = pa.Table.from_pylist(OBJECTS)
    pq.write_table(table, folder / "t", row_group_size=6)
    with pa.ipc.new_file(str(folder / "f"), table.schema) as file:
        file.write_table(table, max_chunksize=6)
    with pa.ipc.new_stream(str(folder / "s"), table.schema) as stream:
        stream.write_table(table, max_chunksize=6)
    return {
        "parquet": (folder / "t").read_bytes(),
        "arrow": (folder / "f").read_bytes(),
        "stream": (folder / "s").read_bytes(),
    }


NAMES = {
    "x.json": LINES,
    "x.JSON": LINES,
    "x.JSONL": LINES,
    "y.ndjson": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "noend.jsonl": LINES[:-1],
    "array.json": json.dumps(OBJECTS).encode(),
    "array.jsonl": json.dumps(OBJECTS, indent=1).encode(),
    "x.json.gz": gzip.compress(LINES),
    "array.json.gz": gzip.compress(json.dumps(OBJECTS).encode()),
    "X.JSONL.GZ": gzip.compress(LINES[:99]) + gzip.compress(LINES[99:]) + b"\0" * 512,
    "x.jsonl.bz2": bz2.compress(LINES[:99]) + bz2.compress(LINES[99:]),
    "x.jsonl.xz": lzma.compress(LINES[:99]) + b"\0" * 4 + lzma.compress(LINES[99:]),
    "x.jsonl.zst": zstd(LINES[:99]) + zstd(LINES[99:]),
    "x.ndjson.zstd": (0x184D2A5E).to_bytes(4, "little") + (9).to_bytes(4, "little") + b"seektable" + zstd(LINES),
    "misnamed.jsonl": gzip.compress(LINES),
    "t.csv": CSV,
    "t.CSV.gz": gzip.compress(CSV),
    "t.tsv": CSV.replace(b",", b"\t"),
    "quoted.csv": b"text,id\r\n" + b"".join(b'"text of document %d",%d\r\n' % (n, n) for n in range(20)),
}


@pytest.mark.parametrize("name", NAMES)
def test_objects_and_rows_are_documents_under_any_file_name(tmp_path, read, name):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_bytes(NAMES[name])
    assert read(tmp_path / "d") == TEXTS
    assert read(tmp_path / "d" / name) == TEXTS


@pytest.mark.parametrize("name", ["a.parquet", "a.PARQUET", "a.arrow", "a.feather", "no-ending", "called.txt"])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_tables_are_known_by_their_magic_numbers(tmp_path, read, name, kind):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_bytes(tables(tmp_path)[kind])
    assert read(tmp_path / "d") == TEXTS


def stream(rows: int) -> bytes:
    table, sink = pa.Table.from_pylist(OBJECTS), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue().to_pybytes()


def archive(path: Path) -> bytes:
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "a.txt")
    return path.read_bytes()


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "tar": ("a.tar", b"", r"a.tar is a tar archive: data=webdataset data.urls=FILE reads the samples"),
    "compressed tar": ("a.tar.gz", b"", r"a.tar.gz is a tar archive, compressed by gzip: data=webdataset"),
    "numpy": ("a.npy", b"\x93NUMPY\1\0", "a.npy is a NumPy array: data=tokens reads token files"),
    "numpy called text": ("a.txt", b"\x93NUMPY\1\0", "a.txt is a NumPy array"),
    "token file": ("a.bin", b"ab" * 50, "a.bin is a token file: data=tokens"),
    "mds": ("shard.00000.mds", b"\1\0\0\0", "is an MDS shard of MosaicML's streaming: write its samples to JSON lines"),
    "zip": ("a.txt", b"PK\x03\x04....", "a.txt is a zip archive: unpack it first"),
    "pdf": ("a.txt", b"%PDF-1.4", "a.txt is a PDF document"),
    "empty gzip": ("a.jsonl.gz", b"", "a.jsonl.gz is named as a file of gzip and is empty"),
    "no gzip": ("a.jsonl.gz", LINES, "named as a file of gzip and does not begin as one: it is"),
    "zstd called gzip": ("a.jsonl.gz", zstd(LINES), "named as a file of gzip and begins as one of zstd"),
    "empty parquet": ("a.parquet", b"", "a.parquet is named as a parquet file and is empty"),
    "no parquet": ("a.parquet", LINES, "a.parquet is named as a parquet file and does not begin as one"),
    "lines called text": ("a.txt", LINES, "first line is a JSON object with 'text': data.args.format=jsonl reads"),
    "lines without an ending": ("part-00000", gzip.compress(LINES), "data.args.format=jsonl reads a document from"),
    "an object over lines": ("a.json", json.dumps(OBJECTS[0], indent=2).encode(), r"object over several lines: `jq -c"),
    "two arrow streams": ("a.arrow", stream(6) * 2, r"a.arrow.*\d+ bytes follow the end of the arrow stream at byte"),
    "half an arrow stream": ("a.arrow", stream(6)[:-8], r"a.arrow.*an arrow stream without its end mark: it is cut"),
    "junk behind gzip": ("a.jsonl.gz", gzip.compress(LINES) + b"junk", "gzip stream is damaged, or bytes follow"),
    "junk behind bzip2": ("a.jsonl.bz2", bz2.compress(LINES) + b"junk", "bzip2 stream is damaged, or bytes follow its"),
    "junk behind xz": ("a.jsonl.xz", lzma.compress(LINES) + b"junk", "xz stream is damaged, or bytes follow its end"),
    "junk behind zstd": ("a.jsonl.zst", zstd(LINES) + b"junk", "zstd stream is damaged, or bytes follow its end"),
    "gzip cut short": ("a.jsonl.gz", gzip.compress(LINES)[:-3], "its last gzip stream is cut short"),
    "bzip2 cut short": ("a.jsonl.bz2", bz2.compress(LINES)[:-3], "its last bzip2 stream is cut short"),
    "xz cut short": ("a.jsonl.xz", lzma.compress(LINES)[:-3], "its last xz stream is cut short"),
    "zstd cut short": ("a.jsonl.zst", zstd(LINES)[:-3], "its last zstd stream is cut short"),
    "a quote left open": ("a.csv", b'id,text\n1,"a\n2,b\n', r"a.csv.*line 3.*unexpected end of data"),
    "a short row": ("a.csv", b"id,text\n1,a\n2\n", r"a.csv.*line 3.*1 values, and the header names 2"),
    "a long row": ("a.csv", b"id,text\n1,a\n2,b,c\n", r"a.csv.*line 3.*3 values, and the header names 2"),
    "columns twice": ("a.csv", b"text,text\n1,a\n", "a.csv.*its header holds 'text' twice"),
    "no such column": ("a.csv", b"body,id\n1,2\n", "a.csv.*no column 'text': it has body, id"),
    "no UTF-8 in a table": ("a.csv", b"id,text\n1,caf\xe9\n", "a.csv.*can't decode byte 0xe9"),
    "nested deeply": ("a.jsonl", b'{"text": "x", "m": ' + b"[" * 20000 + b"]" * 20000 + b"}\n", "nested too deeply"),
    "a number too long": ("a.jsonl", b'{"text": "x", "m": ' + b"9" * 5000 + b"}\n", "a.jsonl.* limit .* digits"),
    "a key twice": ("a.jsonl", b'{"text": "one", "text": "two"}\n', r"a.jsonl.*an object holds 'text' twice"),
    "null": ("a.jsonl", b'{"text": null}\n', r"a.jsonl.*text.* is NoneType"),
    "no UTF-8": ("a.jsonl", b'{"id": "\xe9", "text": "x"}\n', r"a.jsonl.*not UTF-8: byte 0xe9"),
    "surrogates as bytes": ("a.jsonl", b'{"text": "a \xed\xa0\xbd b"}\n', r"a.jsonl.*not UTF-8: byte 0xed"),
    "half a pair": ("a.jsonl", b'{"text": "a \\ud83d b"}\n', r"a.jsonl.*not valid Unicode"),
    "UTF-16": ("a.jsonl", LINES.decode().encode("utf-16"), r"a.jsonl.*not UTF-8"),
    "glued lines": ("a.jsonl", LINES[:-1] + LINES, r"a.jsonl.*not JSON: Extra data"),
    "a line of NULs": ("a.jsonl", LINES + b"\0" * 64 + b"\n", r"a.jsonl.*not JSON"),
    "an array with junk": ("a.json", json.dumps(OBJECTS).encode() + b"]", r"a.json.*not JSON: Extra data"),
    "an array of strings": ("a.json", json.dumps(TEXTS).encode(), r"a.json.*element 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_by_its_name(tmp_path, read, what):
    name, content, message = REFUSED[what]
    (tmp_path / "d").mkdir()
    if ".tar" in name:
        content = archive(tmp_path / "t.tar")
        content = gzip.compress(content) if name.endswith(".gz") else content
    (tmp_path / "d" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path / "d")
    assert str(tmp_path / "d" / name) in str(raised.value) or name in str(raised.value)


def test_the_advice_of_a_refusal_works(tmp_path, read):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_bytes(LINES)
    assert read(tmp_path / "d", args={"format": "jsonl"}) == TEXTS
    assert read(tmp_path / "d", args={"format": "text"}) == [LINES.decode()]
    (tmp_path / "d" / "b.md").write_text("not a document")
    assert read(tmp_path / "d", args={"format": "jsonl", "pattern": "*.txt"}) == TEXTS
    with pytest.raises(
        ValueError, match=r"data.args.format=xml: choose from auto, text, jsonl, json, csv, tsv, parquet"
    ):
        read(tmp_path / "d", args={"format": "xml"})
    pretty = json.dumps({"name": "a package"}, indent=2)
    for path in (tmp_path / "d").iterdir():
        path.unlink()
    (tmp_path / "d" / "package.json").write_text(pretty)
    assert read(tmp_path / "d", args={"format": "text"}) == [pretty]


def test_compressed_texts_are_documents(tmp_path, read):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt.gz").write_bytes(gzip.compress("Stra\u00dfe\n".encode()))
    (tmp_path / "d" / "b.md.xz").write_bytes(lzma.compress(b"b"))
    (tmp_path / "d" / "c.txt").write_bytes(b"c")
    assert read(tmp_path / "d") == ["Stra\u00dfe\n", "b", "c"]


def test_the_window_of_zstd_is_a_key(tmp_path, read):
    (tmp_path / "long.jsonl.zst").write_bytes(zstd(LINES, 28))
    with pytest.raises(
        ValueError, match=r"long.jsonl.zst.*larger than data.zstd_window_log=27 allows: .*=31 reads every"
    ):
        read(tmp_path / "long.jsonl.zst")
    assert read(tmp_path / "long.jsonl.zst", zstd_window_log=31) == TEXTS


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd], ids=["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_what_a_small_file_may_become_is_bounded_by_a_key(tmp_path, read, compress, name):
    opening = {"a.jsonl": b'{"text": "', "a.json": b'[{"text": "', "a.txt": b"", "a.csv": b"text\n"}[name]
    (tmp_path / name).write_bytes(compress(opening + b"a" * (3 << 20)))
    limit = {"max_decompressed_gib": 1 / 1024}
    with pytest.raises(ValueError, match=rf"{name}.*(max_decompressed_gib=0.000976562 of memory|field larger than)"):
        read(tmp_path / name, **limit)


def test_a_large_compressed_file_of_short_lines_is_within_the_limit(tmp_path, read):
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(LINES * 3000))
    assert len(read(tmp_path / "a.jsonl.zst", max_decompressed_gib=1 / 1024)) == 60_000


FOREIGN = {
    "mds": {"version": 2, "shards": [{"format": "mds", "samples": 3, "raw_data": {"basename": "shard.00000.mds"}}]},
    "litdata": {"chunks": [{"filename": "chunk-0-0.bin"}], "config": {"data_format": ["str"]}},
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("target", ["text:open_source", "chat:open_source", "token_files:open_source"])
def test_folders_of_other_libraries_are_refused_by_name(tmp_path, kind, target):
    (tmp_path / "index.json").write_text(json.dumps(FOREIGN[kind]))
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "chunk-0-0.bin")
    with pytest.raises(
        ValueError, match=r"holds (mds shards of MosaicML's streaming|chunks of litdata) \(index.json\): read"
    ):
        import_target(f"stoker.data.{target}")(DataConfig(path=str(tmp_path)))


def test_conversations_are_read_from_json_of_any_name_and_from_nothing_else(tmp_path):
    messages = [{"role": "user", "content": "\ue000\ue000"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "conv.json").write_text((json.dumps({"messages": messages}) + "\n") * 3)
    (tmp_path / "more.json").write_text(json.dumps([{"messages": messages}] * 2))
    config = DataConfig(target="stoker.data.chat:open_source", path=str(tmp_path))
    found = documents_of(import_target(config.target)(config), config.target)
    texts = [text for part in parts_of(found.documents) for _, text, _ in part.texts()]
    assert len(texts) == 5 and all("\ue000\ue000" in text for text in texts)
    (tmp_path / "README.md").write_text("about these conversations")
    with pytest.raises(
        ValueError, match=r"README.md is a text: data=chat reads JSON lines, a JSON array; data.args.pattern"
    ):
        import_target(config.target)(config)
    config.args = {"pattern": "*.json"}
    assert len(documents_of(import_target(config.target)(config), config.target).documents) == 2


def test_shards_of_different_kinds_are_no_source(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.csv").write_bytes(CSV)
    config = DataConfig(name="text", path=str(tmp_path), cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"holds JSON lines and a table of .* values, such as a.jsonl and b.csv: pick"):
        open_shards(config, "*.*", READS, "auto", "text", None)


def test_the_registry_names_every_format_once():
    endings = [ending for one in FORMATS for ending in one.endings]
    assert len(set(endings)) == len(endings) and all(ending == ending.lower() for ending in endings)
    assert len({one.name for one in FORMATS}) == len(FORMATS)
    assert all(one in READS or one.works for one in FORMATS)
    assert set(CHOICES) == {"auto", *(one.name for one in READS)}
