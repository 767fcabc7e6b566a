"""Generated files, read by us in both modes and by the owners of their formats: the same documents, or a refusal.

The owners are `json` for lines and arrays, pyarrow for tables, and the compression libraries' own functions.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import csv as pa_csv

from tests.data.test_formats import indexed, streamed

ODD = st.sampled_from(
    ["", " ", "\n", "\r", "\r\n", "\t", "\0", '"', "'", ",", "\\", "\\n", "{", "[", "NA", "null", "x" * 700]
) | st.sampled_from(
    ["\ufeff", "\u2028", "\u0085", "\x0b", "\x0c", "\ue000\ue000", "\ue001", "\U0010ffff", "e\u0301", "\u202e"]
)
TEXTS = st.lists(st.lists(ODD | st.text(max_size=8), max_size=4).map("".join), min_size=1, max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": lambda data: zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read(),
}
CHEAP = settings(max_examples=60, deadline=None, derandomize=True)


def ours(name: str, data: bytes) -> list[list[str] | None]:
    """The documents in either mode; None where the file is refused."""
    found: list[list[str] | None] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "d" / name
        path.parent.mkdir()
        path.write_bytes(data)
        for read in (indexed, streamed):
            refusal = name
            try:
                found.append(read(path))
            except ValueError as error:
                found.append(None)
                refusal = str(error)
            assert name in refusal
    return found


def agree(name: str, data: bytes, owner: Callable[[bytes], list[str]]) -> bool:
    """Compare with what the owner reads; whether it was read."""
    try:
        theirs: list[str] | None = [text for text in owner(data) if text]
    except Exception:  # libraries raise different errors
        theirs = None
    either = ours(name, data)
    for found in either:
        assert found is None or found == theirs, (name, data[:300])
    assert either[0] == either[1], "the modes differ"
    return either[0] is not None


def of_lines(data: bytes) -> list[str]:
    values = [json.loads(line) for line in data.split(b"\n") if line.strip()]
    return [text_of(value) for value in values]


def of_array(data: bytes) -> list[str]:
    return [text_of(value) for value in json.loads(data)]


def text_of(value: Any) -> str:
    assert isinstance(value, dict) and isinstance(value["text"], str)
    value["text"].encode()
    return value["text"]


def of_table(data: bytes) -> list[str]:
    options = {"parse_options": pa_csv.ParseOptions(newlines_in_values=True)}
    names = pa_csv.read_csv(io.BytesIO(data), **options).schema.names
    convert = pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), include_columns=["text"])
    return pa_csv.read_csv(io.BytesIO(data), convert_options=convert, **options)["text"].to_pylist()


@CHEAP
@given(
    TEXTS,
    st.dictionaries(st.text(max_size=3).filter(lambda key: key != "text"), JSON, max_size=2),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]),
    st.sampled_from(["", "\ufeff"]),
    st.booleans(),
    st.sampled_from(list(COMPRESS)),
    st.sampled_from([".jsonl", ".json", ".NDJSON"]),
)
def test_lines_are_read_as_json_reads_them(texts, extra, ascii_only, end, mark, closed, packed, ending):
    lines = [json.dumps({**extra, "text": text}, ensure_ascii=ascii_only) for text in texts]
    data = (mark + end.join(lines) + (end if closed else "")).encode(errors="surrogatepass")
    assert agree(f"a{ending}{packed}", COMPRESS[packed](data), lambda file: of_lines(DECOMPRESS[packed](file)))


@CHEAP
@given(TEXTS, st.booleans(), st.sampled_from([None, 1]), st.sampled_from(list(COMPRESS)))
def test_arrays_are_read_as_json_reads_them(texts, ascii_only, indent, packed):
    data = json.dumps([{"text": text, "n": 1} for text in texts], ensure_ascii=ascii_only, indent=indent).encode()
    assert agree(f"a.json{packed}", COMPRESS[packed](data), lambda file: of_array(DECOMPRESS[packed](file)))


@CHEAP
@given(
    TEXTS, st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]), st.sampled_from(["\n", "\r\n"])
)
@example(["NA", "null", "1", "2020-01-01"], csv.QUOTE_MINIMAL, "\n")
def test_separated_values_are_read_as_pyarrow_reads_them(texts, quoting, end):
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=quoting, lineterminator=end)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(texts))
    read = agree("a.csv", file.getvalue().encode(), of_table)
    assert read or any("\r" in text for text in texts)  # which csv.writer leaves bare: it ends a row for its readers


@CHEAP
@given(TEXTS, st.integers(1, 5), st.sampled_from(["parquet", "arrow", "stream"]), st.booleans())
def test_tables_are_read_as_pyarrow_reads_them(texts, rows, kind, dictionary):
    column = pa.array(texts, pa.string())
    table = pa.table({"id": list(range(len(texts))), "text": column.dictionary_encode() if dictionary else column})
    sink = pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(table, sink, row_group_size=rows)
    else:
        make = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with make(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    data = sink.getvalue().to_pybytes()
    assert agree(f"a.{'arrow' if kind == 'stream' else kind}", data, lambda _: texts)


PUT = [b"", b'"', b"\n", b"\xff", b"\xed\xa0\xbd", b"}", b"{", b"[", b"\0", b",", b"\\", b"\r"]
MUTATIONS = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(PUT), st.integers(0, 3)), min_size=1, max_size=3)


def mutated(data: bytes, mutations: list[tuple[float, bytes, int]]) -> bytes:
    for place, put, gone in mutations:
        at = int(place * len(data))
        data = data[:at] + put + data[at + gone :]
    return data


@settings(CHEAP, max_examples=150)
@given(TEXTS, MUTATIONS, st.sampled_from(["a.jsonl", "a.json", "a.csv"]))
def test_a_spoilt_text_file_is_read_as_its_owner_reads_it_or_refused(texts, mutations, name):
    if name == "a.csv":
        file = io.StringIO(newline="")
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
        agree(name, mutated(file.getvalue().encode(), mutations), of_table)
        return
    objects = [{"text": text, "n": n} for n, text in enumerate(texts)]
    lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in objects)
    data = mutated((lines if name == "a.jsonl" else json.dumps(objects)).encode(), mutations)
    is_array = data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    agree(name, data, of_array if is_array else of_lines)


@settings(CHEAP, max_examples=100)
@given(
    TEXTS,
    st.sampled_from([ending for ending in COMPRESS if ending]),
    st.floats(0, 1),
    st.sampled_from([b"", b"\0", b"junk"]),
)
def test_a_spoilt_compressed_file_is_never_read_in_part(texts, packed, place, put):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    data = COMPRESS[packed](lines)
    at = int(place * len(data))
    for spoilt in (data[:at] + put, data[:at] + put + data[at + len(put) :], data + put):
        either = ours(f"a.jsonl{packed}", spoilt)
        assert all(found is None or found == [text for text in texts if text] for found in either), packed
        assert either[0] == either[1]


def test_datasets_reads_the_same_files_to_the_same_documents(tmp_path, monkeypatch):
    """What users compare with: `datasets.load_dataset(format, data_files=...)`, on texts that it keeps."""
    import datasets

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    texts = [f"{n} \u00fc \ue000\ue000 \U0001f600 \u2028 {'long ' * n}" for n in range(30)]
    rows = [{"text": text, "n": n} for n, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["text", "n"], *([row["text"], row["n"]] for row in rows)])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    files = {
        "json": {"a.jsonl": lines, "b.json": json.dumps(rows).encode(), "c.jsonl.gz": gzip.compress(lines)},
        "csv": {"a.csv": table.getvalue().encode()},
        "parquet": {"a.parquet": (tmp_path / "a.parquet").read_bytes()},
    }
    for builder, held in files.items():
        for name, data in held.items():
            path = tmp_path / builder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            stream = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
            assert [row["text"] for row in stream] == indexed(path) == streamed(path) == texts, name
