"""The formats of files, for all sources in both modes: recognised by a file's content, and then by its name.

`identify` reads the first bytes: compression and binary formats have magic numbers. Whether a text file is JSON
lines, a JSON array, a table or one document of text follows from its name, and for JSON from its first character. A
name that contradicts the content is refused, and so is every known format that a source cannot read: no file is read
in a wrong format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.conf.records import parse_json
from stoker.data.decompress import COMPRESSIONS, Compression, Limits, compression_of, decompressed
from stoker.data.json_text import BOM

HEAD_BYTES = 64 << 10  # of a file, by which its format is recognised


@dataclass(frozen=True)
class Format:
    """The format of a file, once it is decompressed."""

    name: str  # as data.args.format names it
    words: str
    endings: tuple[str, ...]  # of names, in small letters
    magics: tuple[tuple[int, bytes], ...] = ()  # position and bytes, one of which must match; empty: a text
    works: str | None = None  # for a format that data=text does not read: what to do

    def begins(self, head: bytes) -> bool:
        """Whether a file that begins with `head` has one of the magic numbers."""
        return any(head[at : at + len(magic)] == magic for at, magic in self.magics)


_TOKENS = "data=tokens reads token files"
TEXT = Format("text", "a text", ())
JSON_LINES = Format("jsonl", "JSON lines", (".jsonl", ".ndjson", ".jsonlines", ".ldjson", ".json"))
JSON_ARRAY = Format("json", "a JSON array", ())  # a file of that name is lines if it does not begin as an array
CSV = Format("csv", "a table of comma-separated values", (".csv",))
TSV = Format("tsv", "a table of tab-separated values", (".tsv", ".tab"))
PARQUET = Format("parquet", "a parquet file", (".parquet", ".pq"), ((0, b"PAR1"),))
ARROW = Format("arrow", "an arrow file", (".arrow", ".feather", ".ipc"), ((0, b"ARROW1"), (0, b"\xff\xff\xff\xff")))
TAR = Format(
    "tar",
    "a tar archive",
    (".tar", ".tgz", ".tbz2", ".tbz", ".txz", ".tzst"),
    ((257, b"ustar"),),
    "data=webdataset data.urls=FILE reads the samples of tar archives, and `tar -xf FILE` unpacks one",
)
TABLES = (CSV, TSV, PARQUET, ARROW)
_FOREIGN = (
    Format("npy", "a NumPy array", (".npy",), ((0, b"\x93NUMPY"),), _TOKENS),
    Format("megatron", "an index of Megatron's", (".idx",), ((0, b"MMIDIDX"),), _TOKENS),
    Format("tokens", "a token file", (".bin", ".u16", ".u32", ".tokens"), (), _TOKENS),
    Format("mds", "an MDS shard of MosaicML's streaming", (".mds",), (), "write its samples to JSON lines or parquet"),
    Format("zip", "a zip archive", (".zip", ".npz", ".docx"), ((0, b"PK\x03\x04"),), "unpack it first"),
    Format("7z", "a 7z archive", (".7z",), ((0, b"7z\xbc\xaf\x27\x1c"),), "unpack it first"),
    Format("hdf5", "an HDF5 file", (".h5", ".hdf5"), ((0, b"\x89HDF"),), "write its texts to JSON lines or parquet"),
    Format("sqlite", "an SQLite database", (".sqlite",), ((0, b"SQLite format 3\0"),), "write its texts to JSON lines"),
    Format("orc", "an ORC file", (".orc",), (), "write its texts to parquet"),
    Format("avro", "an Avro file", (".avro",), ((0, b"Obj\x01"),), "write its texts to parquet"),
    Format("feather1", "a Feather file of version 1", (), ((0, b"FEA1"),), "write it again as Feather 2 or parquet"),
    Format("pickle", "a pickle, which may run code", (".pkl", ".pickle", ".pt", ".pth"), (), "write it as JSON lines"),
    Format("lz4", "an lz4 file", (".lz4",), ((0, b"\x04\x22\x4d\x18"),), "decompress it first"),
    Format("pdf", "a PDF document", (".pdf",), ((0, b"%PDF-"),), "extract its text first"),
)
FORMATS = (JSON_LINES, JSON_ARRAY, *TABLES, TAR, *_FOREIGN, TEXT)
BINARY = tuple(one for one in FORMATS if one.magics)
CHOICES = ("auto", *(one.name for one in (TEXT, JSON_LINES, JSON_ARRAY, *TABLES)))


@dataclass(frozen=True)
class Kind:
    """What a file is."""

    format: Format
    compression: Compression | None = None

    def __str__(self) -> str:
        return f"{self.format.words}, compressed by {self.compression.name}" if self.compression else self.format.words


Read = Callable[[int], bytes]  # so many of the first bytes of a file, fewer where it is smaller


def identify(name: str, read: Read, limits: Limits, given: str = "auto", column: str | None = None) -> Kind:
    """The kind of the file `name`. `given` is data.args.format, `column` the key whose value is the document.

    Raises ValueError, naming the file, where name and content contradict each other, and where a file that is not
    named as JSON has an object with `column` on its first line, unless `given` decides.
    """
    if given not in CHOICES:
        raise ValueError(f"data.args.format={given}: choose from {', '.join(CHOICES)}")
    head = read(HEAD_BYTES)
    compression = compression_of(head)
    by_name, stem = _compression_by_name(name)
    if by_name is not None and compression is not by_name:
        begins = f"begins as one of {compression.name}" if compression else "does not begin as one"
        found = begins if head else "is empty"
        raise ValueError(f"{name} is named as a file of {by_name.name} and {found}: it is damaged, or misnamed")
    if compression is not None:
        head = _decompressed_head(name, head, compression, limits)
    if given != "auto":
        return Kind(next(one for one in FORMATS if one.name == given), compression)
    return Kind(_format(name, stem, head, column), compression)


def refuse(name: str, kind: Kind, source: str, reads: Sequence[Format]) -> None:
    """Raise ValueError, with what would work, for a file that is of none of the formats `reads`."""
    if kind.format in reads:
        return
    works = kind.format.works or f"{source} reads {', '.join(one.words for one in reads)}"
    raise ValueError(f"{name} is {kind}: {works}; data.args.pattern picks files by name")


def refuse_foreign_folder(root: Path) -> None:
    """Raise ValueError for a folder of shards that only the library that wrote them can read."""
    try:
        index: Any = parse_json((root / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(index, dict):
        return
    works = "read it with that library and write its samples to JSON lines or parquet"
    shards, chunks = index.get("shards"), index.get("chunks")
    if isinstance(shards, list) and shards and all(isinstance(shard, dict) and "format" in shard for shard in shards):
        raise ValueError(f"{root} holds {shards[0]['format']} shards of MosaicML's streaming (index.json): {works}")
    if isinstance(chunks, list) and isinstance(index.get("config"), dict):
        raise ValueError(f"{root} holds chunks of litdata (index.json): {works}")


def _compression_by_name(name: str) -> tuple[Compression | None, str]:
    """The compression that a name ends with, and the name without it, in small letters."""
    small = name.lower()
    for one in COMPRESSIONS:
        for ending in one.endings:
            if small.endswith(ending):
                return one, small if ending.startswith(".t") else small.removesuffix(ending)
    return None, small


def _decompressed_head(name: str, head: bytes, compression: Compression, limits: Limits) -> bytes:
    found = b""
    try:
        for piece in decompressed([head], compression, limits):
            found += piece
            if len(found) >= HEAD_BYTES:
                break
    except EOFError:  # the head ends inside a stream: what was decompressed is used
        return found[:HEAD_BYTES]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {name}: {error}") from error
    return found[:HEAD_BYTES]


def _format(name: str, stem: str, head: bytes, column: str | None) -> Format:
    by_name = next((one for one in FORMATS if stem.endswith(one.endings)), TEXT)
    by_content = next((one for one in BINARY if one.begins(head)), None)
    if by_content is not None:
        return by_content
    if by_name in (PARQUET, ARROW, TAR):
        found = "does not begin as one" if head else "is empty"
        raise ValueError(f"{name} is named as {by_name.words} and {found}: it is damaged, or misnamed")
    if by_name is JSON_LINES:
        text = head.removeprefix(BOM).lstrip()
        if text.startswith((b"{\n", b"{\r\n")):
            raise ValueError(
                f"{name} holds a JSON object over several lines: `jq -c . {name} > FILE.jsonl` writes one a line, "
                "data.args.format=text reads the file as one text"
            )
        return JSON_ARRAY if text.startswith(b"[") else JSON_LINES
    if by_name is TEXT and column is not None and _holds_object(head, column):
        raise ValueError(
            f"{name} is named as a text, and its first line is a JSON object with {column!r}: data.args.format=jsonl "
            "reads a document from each line, data.args.format=text reads the file as one text"
        )
    return by_name


def _holds_object(head: bytes, column: str) -> bool:
    """Whether a text begins with a line that is a JSON object with the key `column`."""
    line = head.removeprefix(BOM).lstrip().partition(b"\n")[0]
    if not line.startswith(b"{") or f'"{column}"'.encode() not in line:
        return False
    try:
        values = parse_json(line)
    except (ValueError, RecursionError):
        return len(line) > HEAD_BYTES // 2  # the head ends inside the line
    return isinstance(values, dict) and column in values
