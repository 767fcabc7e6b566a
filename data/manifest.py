"""The contents of a source as one fingerprint of its texts, independent of names, times and folder.

The documents are taken in parts of some megabytes, which processes read in parallel.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker.data.documents import Collection, Document
from stoker.data.keys import MemoKey, digest, text_digest
from stoker.data.pool import each

log = logging.getLogger(__name__)

_MEMO_FORMAT = 2  # of the memo: changes when a reader returns other texts for the same bytes
_EMPTY = text_digest(b"")
_DIGEST = len(_EMPTY)
_PART_BYTES = 8 << 20  # of text: seconds of work, little memory
_MOST_PARTS = 10_000
_PART_DOCUMENTS = 1024  # of unknown size


@dataclass(frozen=True)
class Part:
    """Consecutive documents of a source."""

    documents: tuple[Document | Collection, ...]
    size: int  # bytes, about

    def texts(self) -> Iterator[tuple[str, str, bytes]]:
        """The name, the text and its SHA-256 of each document that has any text, in order.

        Raises ValueError, naming the document, when it is not text.
        """
        return (entry for entry in self._all() if entry[2] != _EMPTY)

    def digests(self) -> tuple[bytes, int]:
        """The SHA-256 of its texts one after the other, and how many documents have no text."""
        found = [known for _, _, known in self._all()]
        held = [known for known in found if known != _EMPTY]
        return b"".join(held), len(found) - len(held)

    def _all(self) -> Iterator[tuple[str, str, bytes]]:
        for document in self.documents:
            for name, text in _texts(document):
                yield name, text, _digest(name, text)


@dataclass(frozen=True)
class Manifest:
    """All documents that have text, in order."""

    parts: tuple[Part, ...]
    digests: tuple[bytes, ...]  # by part
    left_out: int = 0  # documents without text

    @property
    def fingerprint(self) -> str:
        return digest(b"".join(self.digests))

    @property
    def documents(self) -> int:
        return sum(map(len, self.digests)) // _DIGEST

    def texts(self, number: int) -> Iterator[tuple[str, str, bytes]]:
        """The texts of a part, read again. Raises ValueError when they no longer match the digests."""
        known, place = self.digests[number], 0
        for name, text, found in self.parts[number].texts():
            if found != known[place : place + _DIGEST]:
                raise ValueError(f"the document {name} changed while it was being tokenised: start again")
            place += _DIGEST
            yield name, text, found
        if place != len(known):
            raise ValueError("documents vanished while they were being tokenised: start again")


def parts_of(documents: Sequence[Document | Collection]) -> list[Part]:
    """`documents` in parts that depend only on them."""
    most = max(_PART_BYTES, sum(document.size for document in documents) // _MOST_PARTS)
    parts: list[Part] = []
    held: list[Document | Collection] = []
    size = 0
    for document in documents:
        held.append(document)
        size += document.size
        if size >= most or len(held) >= _PART_DOCUMENTS:
            parts.append(Part(tuple(held), size))
            held, size = [], 0
    return [*parts, Part(tuple(held), size)] if held else parts


def read_manifest(documents: Sequence[Document | Collection]) -> Manifest:
    """Read every text of a source. Raises ValueError for one that cannot be read, or when none has any text."""
    parts = parts_of(documents)
    found = each(lambda number: parts[number].digests(), [part.size for part in parts], "reading")
    manifest = Manifest(tuple(parts), tuple(digests for digests, _ in found), sum(empty for _, empty in found))
    if not manifest.documents:
        raise ValueError(f"none of the {len(documents)} documents (first: {documents[0].name}) holds any text")
    return manifest


class Memo:
    """Keeps, in small files, the fingerprint of the texts of certain document versions.

    It avoids reading all texts at every start of every rank. It is used only where all documents have a version.
    """

    def __init__(self, folder: Path, documents: Sequence[Document | Collection]) -> None:
        versions = tuple((document.name, document.version) for document in documents)
        self._path = folder / MemoKey(_MEMO_FORMAT, versions).key
        self._usable = all(document.version is not None for document in documents)

    def recall(self) -> str | None:
        """The fingerprint of these documents' texts, if it is known."""
        try:
            fingerprint = self._path.read_text() if self._usable else ""
        except (OSError, UnicodeDecodeError):
            return None
        return fingerprint if len(fingerprint) == 32 else None

    def remember(self, fingerprint: str) -> None:
        """Keep `fingerprint` for the next time; a cache that cannot be written only costs that time."""
        if not self._usable:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(fingerprint)
        except OSError as error:
            log.info("%s not written, so the texts are read again at the next start: %s", self._path, error)


def _texts(document: Document | Collection) -> Iterator[tuple[str, str]]:
    try:
        if isinstance(document, Collection):
            yield from document.read()
        else:
            yield document.name, document.read()
    except OSError as error:  # of a user's source
        raise ValueError(f"cannot read the document {document.name}: {error}") from error


def _digest(name: str, text: str) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"the document {name} reads as {type(text).__name__}, not as text (str)")
    try:
        return text_digest(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"the document {name} is not valid Unicode: {error}") from error
