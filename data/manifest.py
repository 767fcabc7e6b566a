"""What a source holds, as one fingerprint of its texts: neither names, times nor the folder they lie in matter."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.documents import Document

log = logging.getLogger(__name__)

_EMPTY = hashlib.sha256(b"").digest()


@dataclass(frozen=True)
class Entry:
    """A document and the SHA-256 of its text."""

    document: Document
    digest: bytes

    def is_validation(self, share: float) -> bool:
        """Whether this text is kept for validation, as a share of all texts is. Equal texts land on one side."""
        return int.from_bytes(self.digest[:8]) < share * 2**64

    def text(self) -> str:
        """The text again. Raises ValueError when it is no longer the one of the digest."""
        text, digest = read(self.document)
        if digest != self.digest:
            raise ValueError(f"the document {self.document.name} changed while it was being tokenised: start again")
        return text


@dataclass(frozen=True)
class Manifest:
    """All documents that have text, in order."""

    entries: tuple[Entry, ...]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(entry.digest for entry in self.entries)).hexdigest()[:32]


def read(document: Document) -> tuple[str, bytes]:
    """The text of `document` and its SHA-256. Raises ValueError, naming the document, when it is no text."""
    try:
        text = document.read()
    except OSError as error:  # of a user's own source
        raise ValueError(f"cannot read the document {document.name}: {error}") from error
    if not isinstance(text, str):
        raise ValueError(f"the document {document.name} reads as {type(text).__name__}, not as text (str)")
    try:
        return text, hashlib.sha256(text.encode()).digest()
    except UnicodeEncodeError as error:
        raise ValueError(f"the document {document.name} is not valid Unicode: {error}") from error


def read_manifest(documents: Sequence[Document]) -> Manifest:
    """Read every text of a source. Raises ValueError for one that cannot be read, or when none holds any text."""
    entries = (Entry(document, read(document)[1]) for document in documents)
    manifest = Manifest(tuple(entry for entry in entries if entry.digest != _EMPTY))
    if not manifest.entries:
        raise ValueError(f"none of the {len(documents)} documents (first: {documents[0].name}) holds any text")
    return manifest


class Memo:
    """Remembers, in small files, which fingerprint the texts of certain document versions had.

    It spares every start of every rank the reading of all texts. It is used only where all documents have a version.
    """

    def __init__(self, folder: Path, documents: Sequence[Document]) -> None:
        self._path = folder / hashlib.sha256("\n".join(_versions(documents)).encode()).hexdigest()[:32]
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


def _versions(documents: Sequence[Document]) -> Iterator[str]:
    return (f"{document.name} {document.version}" for document in documents)
