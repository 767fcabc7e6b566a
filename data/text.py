"""Texts in files: `data.path` names one file or a folder of them. A file is one document, or holds many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from stoker.conf.hub_names import download_advice
from stoker.conf.schema import DataConfig
from stoker.data.decompress import Limits, TooLarge, decompressed, limits_of, whole
from stoker.data.documents import Collection, Document, file_document, file_paths, stamp
from stoker.data.formats import TABLES, TEXT, Format, Kind, identify, refuse, refuse_foreign_folder
from stoker.data.jsonl import READS as JSON
from stoker.data.jsonl import field, json_collections, pieces_of
from stoker.data.table_files import table_collections

READS = (TEXT, *JSON, *TABLES)


def open_source(config: DataConfig) -> list[Document | Collection]:
    """The texts under `data.path` sorted by relative path, hidden files left out.

    The format of a file follows from its content and its name (`stoker.data.formats`), or is `data.args.format`. Of
    JSON lines, JSON arrays and tables a document is the value of `data.args.text` (default `text`) of an object or row;
    any other file is one document of UTF-8. Each may be compressed. `data.args.pattern` (default `*`) picks files by
    name. Raises ValueError for a path that is missing, unreadable or without such files, and for a file of another
    format.
    """
    args = known_args(config, "data=text", pattern="*", text="text", format="auto")
    column, limits = args["text"], limits_of(config)
    found: list[Document | Collection] = []
    for name, path, kind in _kinds(config, "data=text", args["pattern"], READS, args["format"], column):
        if kind.format in TABLES:
            found += table_collections(name, path, kind, column, limits)
        elif kind.format in JSON:
            found += json_collections(name, path, kind, limits, (column,), _value_of(column), column)
        else:
            found.append(file_document(name, path) if kind.compression is None else _unpacked(name, path, kind, limits))
    return found


def json_documents(
    config: DataConfig,
    what: str,
    pattern: str,
    keys: Sequence[str],
    text_of: Callable[[dict[str, Any]], str],
    version: str,
) -> list[Collection]:
    """The objects of the files under `data.path`, `text_of` each, of a source `what` that reads only JSON.

    `keys` and `version` as in `json_collections`. Raises ValueError as `open_source` does.
    """
    limits = limits_of(config)
    return [
        collection
        for name, path, kind in _kinds(config, what, pattern, JSON, "auto", None)
        for collection in json_collections(name, path, kind, limits, keys, text_of, version)
    ]


def known_args(config: DataConfig, what: str, **defaults: Any) -> dict[str, Any]:
    """`data.args` over `defaults`. Raises ValueError for keys that are not among them."""
    unknown = set(config.args) - set(defaults)
    if unknown:
        known = ", ".join(f"data.args.{name}" for name in defaults)
        raise ValueError(f"{what} has {known}, not {', '.join(sorted(unknown))}")
    return defaults | config.args


def files_of(
    config: DataConfig, what: str, pattern: str, keep: Callable[[str], bool] = lambda name: True
) -> list[tuple[str, Path]]:
    """The name and path of the files under `data.path`, or of the single file.

    Raises ValueError without any, and for the shards of a library that Stoker does not read.
    """
    if config.path is None:
        raise ValueError(f"{what} needs data.path=FOLDER (or one file)")
    root = Path(config.path)
    if not root.exists():
        raise ValueError(f"data.path={root} does not exist{download_advice(root, 'dataset')}")
    if not root.is_dir():
        return [(root.name, root)]
    refuse_foreign_folder(root)
    found = file_paths(
        root,
        keep_folder=lambda name: not name.startswith("."),
        keep_file=lambda name: not name.startswith(".") and fnmatch(name, pattern) and keep(name),
    )
    if not found:
        raise ValueError(f"data.path={root} holds no files that match data.args.pattern={pattern}")
    return found


def _kinds(
    config: DataConfig, what: str, pattern: str, reads: Sequence[Format], given: str, column: str | None
) -> list[tuple[str, Path, Kind]]:
    """Each file with its kind. Raises ValueError for one that is of none of the formats `reads`."""
    limits, found = limits_of(config), []
    for name, path in files_of(config, what, pattern):
        stamp(path)  # it is a regular file
        kind = identify(str(path), partial(_head, path), limits, given, column)
        refuse(str(path), kind, what, reads)
        found.append((name, path, kind))
    return found


def _head(path: Path, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def _value_of(key: str) -> Callable[[dict[str, Any]], str]:
    take = field(key, str)

    def text(values: dict[str, Any]) -> str:
        try:
            return take(values)
        except ValueError as error:
            raise ValueError(
                f"{error}: data.args.text names another key, and data.args.format=text reads each file as one text"
            ) from error

    return text


def _unpacked(name: str, path: Path, kind: Kind, limits: Limits) -> Document:
    version, size = stamp(path)
    version = None if version is None else f"{version} {kind}"
    return Document(name, partial(_read_unpacked, path, kind, limits), version, size)


def _read_unpacked(path: Path, kind: Kind, limits: Limits) -> str:
    try:
        return whole(decompressed(pieces_of(path), kind.compression, limits), limits).decode()
    except (OSError, EOFError, TooLarge) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path} is not UTF-8 text: byte {byte:#04x} at offset {error.start}") from error
