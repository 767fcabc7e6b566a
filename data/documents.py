"""Documents, and functions shared by sources of files.

A source is a function of the config that returns its documents in order: `Document`s, `Collection`s of them, or both.
A source whose texts need an encoder returns a `Source`, which has one.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from stoker.conf.schema import DataConfig
from stoker.conf.targets import import_target
from stoker.data.tokenizer import Tokenizer

_FRESH_SECONDS = 2.0  # the coarsest time stamp of file systems: two writes within it may have the same stamp


@dataclass(frozen=True)
class Document:
    """One text of a source.

    `read` returns the whole text; it raises ValueError naming the document when it cannot. `version` changes whenever
    the text may have changed, and is cheap to get; None when only reading can detect a change.
    """

    name: str
    read: Callable[[], str]
    version: str | None = None
    size: int = 0  # bytes, about, if known


@dataclass(frozen=True)
class Collection:
    """Many texts that are read in order from one place, such as the lines of a file. `read` may be called again."""

    name: str
    read: Callable[[], Iterator[tuple[str, str]]]  # each text's name and the text
    version: str | None = None
    size: int = 0  # bytes, about


class Encoder(Protocol):
    """Turns the texts of a source into tokens, where the tokenizer alone is not enough."""

    @property
    def fingerprint(self) -> str:
        """Differs between two encoders that encode differently."""
        ...

    @property
    def documents_together(self) -> int:
        """How many documents each text makes, which stay in one row."""
        ...

    def encode(self, tokenizer: Tokenizer, name: str, text: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each document of a text its ids, and the weight of each in the loss, float32; one of weight 0 is not
        trained on. Raises ValueError naming the text."""
        ...


@dataclass(frozen=True)
class Source:
    """Documents, and their encoder."""

    documents: Sequence[Document | Collection]
    encoder: Encoder | None = None


def documents_of(found: object, target: str) -> Source:
    """The result of `data.target` as a `Source`. Raises ValueError when it holds no documents."""
    source = found if isinstance(found, Source) else Source(tuple(found))  # type: ignore[arg-type]
    if not source.documents:
        raise ValueError(f"data.target={target} returned no documents")
    return source


def open_source(config: DataConfig) -> list[Document | Collection]:
    """The documents that `data.target` returns for `config`, in order. Raises ValueError when there are none."""
    return list(documents_of(import_target(config.target)(config), config.target).documents)


def file_documents(root: Path, keep_folder: Callable[[str], bool], keep_file: Callable[[str], bool]) -> list[Document]:
    """A document for each of `file_paths`."""
    return [file_document(name, path) for name, path in file_paths(root, keep_folder, keep_file)]


def file_paths(
    root: Path, keep_folder: Callable[[str], bool], keep_file: Callable[[str], bool]
) -> list[tuple[str, Path]]:
    """Relative and whole path of each file under `root` whose name and folders' names are kept, sorted.

    Symbolic links are followed. Raises ValueError for a folder that cannot be listed: nothing is left out silently.
    """
    found = []
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if keep_folder(name)]
        found += [Path(folder, name) for name in files if keep_file(name)]
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def file_document(name: str, path: Path) -> Document:
    """The text of one file, which must be UTF-8. Raises ValueError when it is no regular file."""
    version, size = stamp(path)
    return Document(name, partial(_read, path), version, size)


def stamp(path: Path) -> tuple[str | None, int]:
    """The version of a file, None while a second write might not change it, and its bytes.

    Raises ValueError when it is no regular file.
    """
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
    return version, status.st_size


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
