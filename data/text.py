"""Texts in files: `data.path` names one file or a folder of them. A file is one document, or has one on each line."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from stoker.conf.schema import DataConfig
from stoker.data.documents import Collection, Document, file_document, file_paths
from stoker.data.jsonl import field, is_jsonl, jsonl_collections


def open_source(config: DataConfig) -> list[Document | Collection]:
    """The texts under `data.path` sorted by relative path, hidden files left out.

    A file of JSON lines (`.jsonl`, also `.gz` and `.zst`) has a document on each line, in the object's key
    `data.args.text` (default `text`); any other is one document of UTF-8. `data.args.pattern` (default `*`) picks files
    by name. Raises ValueError for a path that is missing, unreadable or without such files.
    """
    args = known_args(config, "data=text", pattern="*", text="text")
    text_of = field(args["text"], str)
    found: list[Document | Collection] = []
    for name, path in files_of(config, "data=text", args["pattern"]):
        found += jsonl_collections(name, path, args["text"], text_of) if is_jsonl(path) else [file_document(name, path)]
    return found


def known_args(config: DataConfig, what: str, **defaults: Any) -> dict[str, Any]:
    """`data.args` over `defaults`. Raises ValueError for keys that are not among them."""
    unknown = set(config.args) - set(defaults)
    if unknown:
        known = ", ".join(f"data.args.{name}" for name in defaults)
        raise ValueError(f"{what} knows {known}, not {', '.join(sorted(unknown))}")
    return defaults | config.args


def files_of(
    config: DataConfig, what: str, pattern: str, keep: Callable[[str], bool] = lambda name: True
) -> list[tuple[str, Path]]:
    """The name and path of the files under `data.path`, or of the one it is. Raises ValueError without any."""
    if config.path is None:
        raise ValueError(f"{what} needs data.path=FOLDER (or one file)")
    root = Path(config.path)
    if not root.exists():
        raise ValueError(f"data.path={root} does not exist")
    if not root.is_dir():
        return [(root.name, root)]
    found = file_paths(
        root,
        keep_folder=lambda name: not name.startswith("."),
        keep_file=lambda name: not name.startswith(".") and fnmatch(name, pattern) and keep(name),
    )
    if not found:
        raise ValueError(f"data.path={root} holds no files that match data.args.pattern={pattern}")
    return found
