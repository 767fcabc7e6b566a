"""Text files: `data.path` names one file, which is one document, or a folder of them."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from conf.schema import DataConfig
from data.documents import Document, file_document, file_documents


def open_source(config: DataConfig) -> list[Document]:
    """The files under `data.path` sorted by relative path, hidden ones left out, each one document of UTF-8 text.

    `data.args.pattern` (default `*`) picks files by name. Raises ValueError for a path that is missing, unreadable or
    without such files.
    """
    if config.path is None:
        raise ValueError("data=text needs data.path=FOLDER (or one file)")
    unknown = set(config.args) - {"pattern"}
    if unknown:
        raise ValueError(f"data=text knows data.args.pattern, not {', '.join(sorted(unknown))}")
    root, pattern = Path(config.path), config.args.get("pattern", "*")
    if not root.exists():
        raise ValueError(f"data.path={root} does not exist")
    if not root.is_dir():
        return [file_document(root.name, root)]
    documents = file_documents(
        root,
        keep_folder=lambda name: not name.startswith("."),
        keep_file=lambda name: not name.startswith(".") and fnmatch(name, pattern),
    )
    if not documents:
        raise ValueError(f"data.path={root} holds no files that match data.args.pattern={pattern}")
    return documents
