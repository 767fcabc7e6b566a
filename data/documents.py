"""Documents, and what sources of files have in common."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from conf.schema import DataConfig
from parallel.optimizer import import_target

_FRESH_SECONDS = 2.0  # the coarsest clock a file system stamps with: two writes within it may carry one stamp


@dataclass(frozen=True)
class Document:
    """One text of a source.

    `read` returns the whole text; it raises ValueError naming the document when it cannot. `version` changes whenever
    the text may have changed, and is cheap to know; None when only reading tells.
    """

    name: str
    read: Callable[[], str]
    version: str | None = None


def open_source(config: DataConfig) -> list[Document]:
    """The documents that `data.target` gives for `config`, in order. Raises ValueError when there are none."""
    documents = list(import_target(config.target)(config))
    if not documents:
        raise ValueError(f"data.target={config.target} gives no documents")
    return documents


def file_documents(root: Path, keep_folder: Callable[[str], bool], keep_file: Callable[[str], bool]) -> list[Document]:
    """A document for each file under `root` whose own name and folders' names are kept, sorted by relative path.

    Symbolic links are followed. Raises ValueError for a folder that cannot be listed, a file that cannot be looked at
    and whatever is kept but is no regular file: nothing is left out without a word.
    """
    found = []
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if keep_folder(name)]
        found += [Path(folder, name) for name in files if keep_file(name)]
    named = sorted((path.relative_to(root).as_posix(), path) for path in found)
    return [file_document(name, path) for name, path in named]


def file_document(name: str, path: Path) -> Document:
    """The text of one file, which must be UTF-8. Raises ValueError when it is no regular file."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"cannot read {path}: it is no regular file")
    changed = max(status.st_mtime, status.st_ctime)
    version = None
    if time.time() - changed > _FRESH_SECONDS:
        stamps = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        version = f"{path.absolute()} {stamps}"
    return Document(name, partial(_read, path), version)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path} is not UTF-8 text: byte {byte:#04x} at offset {error.start}") from error


def _refuse(error: OSError) -> None:
    raise ValueError(f"cannot list {error.filename}: {error.strerror}") from error
