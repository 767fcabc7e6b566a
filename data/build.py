"""Tokenising a source into files: part by part on all cores, resumed after a kill.

Each part writes its files and, last, a note of their contents. A builder that finds a note and files of the noted
lengths does not make that part again. When all parts exist they are joined.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stoker.data.documents import Encoder
from stoker.data.keys import is_validation
from stoker.data.manifest import Manifest
from stoker.data.pool import each
from stoker.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")
_BATCH_CHARACTERS = 4 << 20  # texts tokenised together: enough for all cores, little memory
_BLOCK = 4 << 20  # bytes copied at a time


@dataclass(frozen=True)
class Recipe:
    """How the texts of a manifest become token files."""

    tokenizer: Tokenizer
    encoder: Encoder | None  # None: by the tokenizer alone
    validation: float  # share of the documents

    @property
    def dtype(self) -> str:
        return "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"

    @property
    def arrays(self) -> dict[str, str]:
        """The files of a part, and their dtypes: kind by kind."""
        encoded = {"learned": "uint8", "weights": "float32"} if self.encoder is not None else {}
        return {"tokens": self.dtype, "starts": "int64", **encoded}


def write_splits(folder: Path, manifest: Manifest, recipe: Recipe) -> dict[str, Any]:
    """Make `<split>.<kind>` in `folder` for both splits; returns their description for meta.json.

    Raises ValueError for a text that changed since the manifest was read.
    """
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    sizes = [part.size for part in manifest.parts]
    each(lambda number: _make_part(parts, number, manifest, recipe), sizes, "tokenising")
    notes = [_read_note(parts, number, recipe) for number in range(len(sizes))]
    kinds = [kind for kind in recipe.arrays if kind != "weights" or any(note["weighted"] for note in notes)]
    splits = {split: _put_together(folder, parts, split, notes, kinds) for split in SPLITS}
    shutil.rmtree(parts)
    found = {"tokenizer": recipe.tokenizer.fingerprint, "dtype": recipe.dtype, "splits": splits}
    together = recipe.encoder.documents_together if recipe.encoder is not None else 1
    grouped = {"documents_together": together} if together > 1 else {}
    return {**found, **grouped, "left_out": manifest.left_out}


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> int:
    """Write `pieces` to `path` and sync it to the disk; returns the CRC-32 of the file."""
    crc = 0
    with open(path, "wb") as file:
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return crc


def _make_part(folder: Path, number: int, manifest: Manifest, recipe: Recipe) -> None:
    with suppress(OSError, ValueError, KeyError):  # with any fault in a note, the part is made again
        _read_note(folder, number, recipe)
        return
    note: dict[str, Any] = {split: {"tokens": 0, "documents": 0} for split in SPLITS}
    note["weighted"] = False  # is there a weight other than 0 and 1?
    with ExitStack() as stack:
        files = {
            (split, kind): stack.enter_context(open(_part(folder, number, split, kind), "wb"))
            for split in SPLITS
            for kind in recipe.arrays
        }
        for split, ids, weights in _encoded(manifest.texts(number), recipe):
            counts = note[split]
            files[split, "starts"].write(np.int64(counts["tokens"]).tobytes())
            files[split, "tokens"].write(ids.astype(recipe.dtype).tobytes())
            if weights is not None:
                files[split, "learned"].write((weights != 0).astype(np.uint8).tobytes())
                files[split, "weights"].write(weights.astype(np.float32).tobytes())
                note["weighted"] |= not np.isin(weights, (0, 1)).all()
            counts["tokens"] += len(ids)
            counts["documents"] += 1
    temporary = folder / f"{number}.note.{os.getpid()}"
    temporary.write_text(json.dumps(note))
    temporary.replace(folder / f"{number}.note")


def _read_note(folder: Path, number: int, recipe: Recipe) -> dict[str, Any]:
    """The note of a part. Raises OSError, ValueError or KeyError when the part is not complete."""
    note = json.loads((folder / f"{number}.note").read_text())
    for split in SPLITS:
        for kind, dtype in recipe.arrays.items():
            count = note[split]["documents" if kind == "starts" else "tokens"]
            if _part(folder, number, split, kind).stat().st_size != count * np.dtype(dtype).itemsize:
                raise ValueError(f"part {number} is not whole")
    return note


def _part(folder: Path, number: int, split: str, kind: str) -> Path:
    return folder / f"{number}.{split}.{kind}"


def _encoded(
    texts: Iterable[tuple[str, str, bytes]], recipe: Recipe
) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """Split, ids and weights of each document, closed by its end."""
    end = np.array([recipe.tokenizer.end_of_document], np.uint32)
    for batch in _batches(texts):
        if recipe.encoder is None:
            found = recipe.tokenizer.encode_batch([text for _, text, _ in batch])
            for (_, _, digest), ids in zip(batch, found, strict=True):
                yield _split(digest, recipe), np.concatenate([ids, end]), None
            continue
        for name, text, digest in batch:
            for ids, weights in recipe.encoder.encode(recipe.tokenizer, name, text):
                yield _split(digest, recipe), ids, weights


def _split(digest: bytes, recipe: Recipe) -> str:
    return "validation" if is_validation(digest, recipe.validation) else "train"


def _batches(texts: Iterable[tuple[str, str, bytes]]) -> Iterator[list[tuple[str, str, bytes]]]:
    batch: list[tuple[str, str, bytes]] = []
    characters = 0
    for entry in texts:
        batch.append(entry)
        characters += len(entry[1])
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _put_together(
    folder: Path, parts: Path, split: str, notes: list[dict[str, Any]], kinds: Iterable[str]
) -> dict[str, Any]:
    """The files of a split from those of the parts, of these `kinds`."""
    counts = [note[split] for note in notes]
    firsts = np.cumsum([0, *(count["tokens"] for count in counts)])
    sums = {}
    for kind in kinds:
        files = [_part(parts, number, split, kind) for number in range(len(notes))]
        if kind == "starts":
            pieces: Iterator[bytes] = (
                (np.fromfile(path, np.int64) + first).tobytes() for path, first in zip(files, firsts, strict=False)
            )
        else:
            pieces = _blocks(files)
        sums[kind] = write_file(folder / f"{split}.{kind}", pieces)
    return {"tokens": int(firsts[-1]), "documents": sum(count["documents"] for count in counts), "crc32": sums}


def _blocks(files: Iterable[Path]) -> Iterator[bytes]:
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                yield block
