"""The token cache: each source tokenised once into files that are then mapped, never read whole.

    <data.cache>/<key>/train.tokens        ids of all documents end to end, each closed by end_of_document
                       train.starts        int64 number of each document's first token
                       validation.tokens   the same for the documents kept for validation
                       validation.starts
                       tokenizer.json      of tokenizer=bpe
                       meta.json           counts, by which a damaged directory is known

The key is a fingerprint of the texts, the tokenizer and the split, so a directory never changes once it is there. It is
made under a lock in a directory beside it, synced, and renamed into place. Opening takes no lock: a cache that is ready
can be read-only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import DataConfig
from data.documents import open_source
from data.manifest import Entry, Manifest, Memo, read_manifest
from data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer

log = logging.getLogger(__name__)

SPLITS = ("train", "validation")
_FORMAT = 1
_BATCH_CHARACTERS = 4 << 20  # texts tokenised together: enough for all cores, little memory


@dataclass(frozen=True)
class Tokens:
    """One split of a tokenised source, mapped from its files."""

    ids: np.ndarray  # uint16 or uint32 [tokens]
    starts: np.ndarray  # int64 [documents], the number of each document's first token


@dataclass(frozen=True)
class TokenCache:
    """A ready cache directory."""

    folder: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def content(self) -> str:
        """Fingerprint of the texts."""
        return self.meta["recipe"]["content"]

    def tokens(self, split: str) -> Tokens:
        """The tokens of `train` or `validation`."""
        return Tokens(*(_map(self.folder / name, dtype, count) for name, dtype, count in _arrays(self.meta, split)))


def open_cache(config: DataConfig) -> TokenCache:
    """The tokens of `config`'s source, made first if they are not there or are damaged.

    Any number of processes may call this at once: one of them builds. Raises ValueError for texts that cannot be read
    and for a cache directory that cannot be used.
    """
    root = _root(config)
    documents = open_source(config)
    memo = Memo(root / "versions", documents)
    content = memo.recall()
    if content is not None:
        ready = _open(root, _recipe(config, content))
        if ready is not None:
            return ready
    manifest = read_manifest(documents)
    recipe = _recipe(config, manifest.fingerprint)
    ready = _open(root, recipe)
    if ready is None:
        try:
            with _lock(root, recipe):
                ready = _open(root, recipe)  # another process may have built it meanwhile
                if ready is None:
                    _build(root, recipe, config, manifest)
                    ready = _open(root, recipe)
        except OSError as error:
            raise ValueError(
                f"cannot keep tokens in {root}: {error.strerror or error}; name another data.cache"
            ) from error
        assert ready is not None
    memo.remember(manifest.fingerprint)
    return ready


def _root(config: DataConfig) -> Path:
    if config.cache is not None:
        return Path(config.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stoker"


def _recipe(config: DataConfig, content: str) -> dict[str, Any]:
    """All that the files of a cache directory depend on."""
    tokenizer = "byte" if config.tokenizer == "byte" else f"{config.tokenizer} {config.bpe_vocab}"
    return {"format": _FORMAT, "content": content, "tokenizer": tokenizer, "validation": config.validation}


def _folder(root: Path, recipe: dict[str, Any]) -> Path:
    return root / hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]


def _open(root: Path, recipe: dict[str, Any]) -> TokenCache | None:
    """The cache of `recipe`, or None when it is not there or, with a warning, damaged."""
    folder = _folder(root, recipe)
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["recipe"] != recipe:
            raise ValueError("its meta.json speaks of another recipe")
        for split in SPLITS:
            for name, dtype, count in _arrays(meta, split):
                size = (folder / name).stat().st_size
                if size != np.dtype(dtype).itemsize * count:
                    raise ValueError(f"{name} has {size} bytes, not {count} x {np.dtype(dtype).itemsize}")
        tokenizer = _load_tokenizer(folder, recipe)
        if tokenizer.fingerprint != meta["tokenizer"]:
            raise ValueError("tokenizer.json is not the one it was made with")
    except Exception as error:  # whatever is wrong with a cache, making it again is the cure
        log.warning("the token cache %s is damaged and made again: %s", folder, error)
        return None
    return TokenCache(folder, meta, tokenizer)


def _arrays(meta: dict[str, Any], split: str) -> tuple[tuple[str, str, int], tuple[str, str, int]]:
    """File name, dtype and number of elements of the two files of `split`."""
    counts = meta["splits"][split]
    return (
        (f"{split}.tokens", meta["dtype"], counts["tokens"]),
        (f"{split}.starts", "int64", counts["documents"]),
    )


def _map(path: Path, dtype: str, count: int) -> np.ndarray:
    if count == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r", shape=(count,)).view(np.ndarray)


def _load_tokenizer(folder: Path, recipe: dict[str, Any]) -> Tokenizer:
    name, *vocabulary = recipe["tokenizer"].split()
    if name == "byte":
        return ByteTokenizer()
    return BpeTokenizer((folder / "tokenizer.json").read_text(), int(vocabulary[0]))


@contextmanager
def _lock(root: Path, recipe: dict[str, Any]) -> Iterator[None]:
    """Only one process at a time builds a recipe; the kernel frees the lock of one that dies."""
    root.mkdir(parents=True, exist_ok=True)
    with open(_folder(root, recipe).with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(root: Path, recipe: dict[str, Any], config: DataConfig, manifest: Manifest) -> None:
    folder = _folder(root, recipe)
    log.info("tokenising %d documents into %s", len(manifest.entries), folder)
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a builder that was killed
    unfinished.mkdir()
    try:
        _write(unfinished, recipe, config, manifest)
        _sync(unfinished)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        _sync(root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(folder: Path, recipe: dict[str, Any], config: DataConfig, manifest: Manifest) -> None:
    splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for entry in manifest.entries:
        splits["validation" if entry.is_validation(config.validation) else "train"].append(entry)
    tokenizer: Tokenizer = ByteTokenizer()
    if config.tokenizer == "bpe":
        tokenizer = BpeTokenizer.train((entry.text() for entry in splits["train"]), config.bpe_vocab)
        _write_file(folder / "tokenizer.json", [tokenizer.json.encode()])
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    counts = {split: _write_split(folder, split, splits[split], tokenizer, dtype) for split in SPLITS}
    meta = {"recipe": recipe, "tokenizer": tokenizer.fingerprint, "dtype": dtype, "splits": counts}
    _write_file(folder / "meta.json", [json.dumps(meta, indent=1).encode()])


def _write_split(
    folder: Path, split: str, entries: Iterable[Entry], tokenizer: Tokenizer, dtype: str
) -> dict[str, int]:
    starts, total = array("q"), 0
    end = np.array([tokenizer.end_of_document], dtype).tobytes()

    def pieces() -> Iterator[bytes]:
        nonlocal total
        for texts in _batches(entries):
            for ids in tokenizer.encode_batch(texts):
                starts.append(total)
                total += len(ids) + 1
                yield ids.astype(dtype).tobytes()
                yield end

    _write_file(folder / f"{split}.tokens", pieces())
    _write_file(folder / f"{split}.starts", [starts.tobytes()])
    return {"tokens": total, "documents": len(starts)}


def _batches(entries: Iterable[Entry]) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for entry in entries:
        texts.append(entry.text())
        characters += len(texts[-1])
        if characters >= _BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _write_file(path: Path, pieces: Iterable[bytes]) -> None:
    with open(path, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
