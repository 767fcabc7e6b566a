"""The key of every cache and the fingerprint of every state, each made here from typed ingredients.

A key that lacks an ingredient gives one run the files of another; a fingerprint that lacks one lets a run continue
with other sequences. So everything that changes sequences is a field of one of these classes:

    MemoKey              which texts some versions of files had             manifest.py
    TokensKey            the tokens of a source                             cache.py
    RowTableKey          the rows that a packing makes of them              tables.py
    TaughtKey            the rows for which a teacher's predictions are stored  taught.py
    IndexedFingerprint   the sequences of an indexed run                    opening.py
    SplitsKey            the position of each document in a streamed source     streaming/
    WindowsKey           the windows of a streamed source
    HeldOutKey           documents of one to evaluate                       streaming/held_out.py
    StreamedFingerprint  the sequences of a streamed run                    streaming/loader.py
    BlockKey, IndexKey   a downloaded block; the positions of a tar's samples

The place, names and dates of the data, and the number of reading processes, are in none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any


def digest(value: Any) -> str:
    """128 bits of SHA-256, in hex, of JSON values or of bytes."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:32]


def text_digest(text: bytes) -> bytes:
    """The SHA-256 of one document."""
    return hashlib.sha256(text).digest()


def is_validation(document: bytes, share: float) -> bool:
    """Whether the document with this SHA-256 is kept for validation, as `share` of all are. Copies share a side."""
    return int.from_bytes(document[:8]) < share * 2**64


class _Ingredients:
    """A frozen dataclass whose fields are JSON values, or ingredients themselves."""

    def values(self) -> dict[str, Any]:
        """The ingredients by name."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value.values() if isinstance(value, _Ingredients) else value for name, value in held.items()}

    @property
    def key(self) -> str:
        """A name for a file or folder."""
        return digest([type(self).__name__, self.values()])


@dataclass(frozen=True)
class MemoKey(_Ingredients):
    format: int
    versions: tuple[tuple[str, str | None], ...]  # name and version of each document, in order


@dataclass(frozen=True)
class TokensKey(_Ingredients):
    format: int
    content: str  # of the texts: each byte of each document, in order
    tokenizer: str
    validation: float
    encoder: str | None  # of texts that the tokenizer alone does not encode: the chat template


@dataclass(frozen=True)
class SourceKey(_Ingredients):
    """The documents of a source as tokens."""

    content: str
    tokenizer: str | None
    encoder: str | None
    validation: float
    validation_by: str | None = None  # position: the last tokens are kept, rather than documents

    def values(self) -> dict[str, Any]:
        found = super().values()
        return found if self.validation_by is not None else {k: v for k, v in found.items() if k != "validation_by"}


@dataclass(frozen=True)
class RowTableKey(_Ingredients):
    format: int
    source: SourceKey
    split: str
    packing: str
    seq_len: int


@dataclass(frozen=True)
class TaughtKey(_Ingredients):
    """The rows of one epoch of a source, unshuffled, and what a token of them may attend to."""

    source: SourceKey
    split: str
    packing: str
    document_mask: bool
    seq_len: int

    def values(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {**self.source.values(), **own}


@dataclass(frozen=True)
class IndexedFingerprint(_Ingredients):
    """Everything that the sequences of an indexed run depend on. `sources` by name, in the order of the config."""

    format: int
    tokenizer: str | None
    split: str
    validation: float
    packing: str
    document_mask: bool
    seq_len: int
    seed: int
    sources: tuple[tuple[str, SourceKey], ...]
    mixed: bool  # whether the sources are in data.sources, which may have one only

    def values(self) -> dict[str, Any]:
        common = {field.name: getattr(self, field.name) for field in fields(self)[:-2]}
        encoders = {name: source.encoder for name, source in self.sources if source.encoder is not None}
        kept_by = {name: source.validation_by for name, source in self.sources if source.validation_by is not None}
        own = {name: source.validation for name, source in self.sources if source.validation != self.validation}
        if not self.mixed:
            ((_, source),) = self.sources
            return {
                **common,
                "content": source.content,
                "encoder": source.encoder,
                "validation_by": source.validation_by,
            }
        return {
            **common,
            "sources": {name: source.content for name, source in self.sources},
            "encoders": encoders or None,
            "validations": own or None,
            "validation_by": kept_by or None,
            "order": [name for name, _ in self.sources] if len(self.sources) > 1 else None,
        }


@dataclass(frozen=True)
class SplitsKey(_Ingredients):
    """The documents of a streamed source, and the split of each."""

    format: str
    shards: str | None  # their names and sizes; None where they have none
    content: str | None  # samples of their bytes; None where only reading all of them would show it
    reading: tuple[tuple[str, Any], ...]  # other settings that decide which documents are read, by name

    def values(self) -> dict[str, Any]:
        found = {"format": self.format, **dict(self.reading), "content": self.content}
        return found if self.shards is None else {**found, "shards": self.shards}


@dataclass(frozen=True)
class WindowsKey(_Ingredients):
    source: Mapping[str, Any]  # `SplitsKey.values()`
    splits: int
    shuffle_window: int
    seed: int
    tokenizer: str
    validation: float
    validation_by: str | None = None  # position: the end of the one document is kept

    def values(self) -> dict[str, Any]:
        return {**self.source, **{field.name: getattr(self, field.name) for field in fields(self)[1:]}}


@dataclass(frozen=True)
class HeldOutKey(_Ingredients):
    format: int
    windows: WindowsKey
    rows: int
    seq_len: int
    packing: str
    skipping: bool  # whether damaged documents were left out
    split: str  # validation | train


@dataclass(frozen=True)
class StreamedFingerprint(_Ingredients):
    """Everything that the sequences of a streamed run depend on. `sources` by name, in the order of the config."""

    format: int
    streams: int
    assign_every: int
    packing: str
    document_mask: bool
    seq_len: int
    sources: tuple[tuple[str, WindowsKey], ...]

    def values(self) -> dict[str, Any]:
        found: dict[str, Any] = {"mode": "streaming"}
        found |= {field.name: getattr(self, field.name) for field in fields(self)[:-1]}
        for name, source in self.sources:
            found |= {f"{name}.{key}": value for key, value in source.values().items()}
        return {**found, "order": [name for name, _ in self.sources] if len(self.sources) > 1 else None}


@dataclass(frozen=True)
class BlockKey(_Ingredients):
    url: str
    size: int
    version: str
    block: int  # bytes
    number: int


@dataclass(frozen=True)
class IndexKey(_Ingredients):
    url: str
    size: int
    version: str


@dataclass(frozen=True)
class Comparison:
    """How the fingerprint of a state compares with today's."""

    different: tuple[str, ...]  # names of ingredients
    unrecorded: tuple[str, ...]  # ingredients that the state does not hold, and that may have changed


# Every version recorded names and sizes of shards, and the windows in a state are read and counted again.
_PROVEN_BY_READING = "content"


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Comparison:
    """Compare today's fingerprint with the one of a state, which an earlier version may have stored.

    One rule holds for an ingredient that the state lacks because that version did not record it. If today's value is
    None the data do not have it, and did not then. If it is samples of the shards of a streamed source, the windows
    that are read again prove it. Any other may have changed since: it is unrecorded, and the user decides.
    """
    different, unrecorded = [], []
    for name in sorted({*ours, *theirs}):
        value = ours.get(name)
        if name in theirs or name == "format":  # which every version records
            if value != theirs.get(name):
                different.append(name)
        elif value is not None and name.rpartition(".")[2] != _PROVEN_BY_READING:
            unrecorded.append(name)
    return Comparison(tuple(different), tuple(unrecorded))


_MEANINGS = {
    "content": "the documents",
    "encoder": "the chat template, its settings and the release of transformers",
    "encoders": "chat templates, their settings and the release of transformers",
    "format": "the version of the rules by which documents become sequences",
    "shards": "the names and sizes of the shards",
}


def described(name: str) -> str:
    """The name of an ingredient, with what it stands for where the name alone does not tell a user."""
    meaning = _MEANINGS.get(name.rpartition(".")[2])
    return name if meaning is None else f"{name} ({meaning})"


def bytes_digest(pieces: Iterable[bytes]) -> str:
    """128 bits of the SHA-256 of bytes, a piece after the other, in hex."""
    return file_digest(pieces)[:32]


def file_digest(pieces: Iterable[bytes]) -> str:
    """The SHA-256 of bytes, a piece after the other, in hex."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()
