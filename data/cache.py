"""The token cache: each source tokenised once into files that are then mapped, never read whole.

    <data.cache>/<key>/train.tokens        ids of all documents end to end, each closed by end_of_document
                       train.starts        int64 number of each document's first token
                       train.learned       uint8 for each token, 1 where it is trained on; only for conversations
                       train.weights       float32 for each token; only where a message has another weight than 0 or 1
                       validation.*        the same for the documents kept for validation
                       tokenizer/          the files to load the tokenizer again
                       meta.json           counts and CRC-32s, by which damage is detected
                       <packing>-...       row tables made of them since (tables.py)

The key is a fingerprint of the texts, the tokenizer and the split, so a finished directory never changes. It is
made under a lock in a directory beside it, synced, and renamed into place; the next builder uses the work of a killed
one. Opening takes no lock: a cache that is ready can be read-only. Such a folder can be moved anywhere: `data=tokens`
reads it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stoker.conf.durable import sync_directory
from stoker.conf.records import parse_json
from stoker.conf.schema import DataConfig
from stoker.conf.user import cache_folder
from stoker.data.build import SPLITS, Recipe, write_file, write_splits
from stoker.data.documents import Source
from stoker.data.keys import TokensKey, is_validation
from stoker.data.manifest import Manifest, Memo, read_manifest
from stoker.data.pool import Killed
from stoker.data.splitting import joined
from stoker.data.tokenizer import JsonTokenizer, Tokenizer
from stoker.data.tokenizer_files import load_kept, named_tokenizer
from stoker.data.tokens import Tokens

log = logging.getLogger(__name__)

FORMAT = 3
_READ = (2, 3)  # formats that a folder may have: 2 does not count the documents without text
META = "meta.json"
_BLOCK = 4 << 20  # bytes read at a time to verify


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

    @property
    def encoder(self) -> str | None:
        """Fingerprint of the encoder, where texts are not encoded by the tokenizer only."""
        return self.meta["recipe"].get("encoder")

    @property
    def left_out(self) -> int | None:
        """How many documents had no text; None where the version that made the folder did not count them."""
        return self.meta.get("left_out")

    @property
    def documents(self) -> int:
        """How many documents there are, of both splits."""
        return sum(self.meta["splits"][split]["documents"] for split in SPLITS)

    def tokens(self, split: str) -> Tokens:
        """The tokens of `train`, of `validation`, or of `all` documents, those of validation last."""
        if split == "all":
            return joined([self.tokens(one) for one in SPLITS])
        found = {kind: _map(self.folder / name, dtype, count) for kind, name, dtype, count in _arrays(self.meta, split)}
        together = self.meta.get("documents_together", 1)
        return Tokens(found["tokens"], found["starts"], found.get("learned"), found.get("weights"), together)


def open_cache(config: DataConfig, source: Source, given: Tokenizer | None = None) -> TokenCache:
    """The tokens of `source`, made first if they are not there or are damaged.

    The tokenizer is `given`, or else the one that the config names.
    Any number of processes may call this at once: one of them builds. Raises ValueError for texts that cannot be read
    and for a cache directory that cannot be used.
    """
    root = cache_root(config)
    memo = Memo(root / "versions", source.documents)
    tokenizer = given or named_tokenizer(config)
    content = memo.recall()
    if content is not None:
        ready = _open(root, _key(config, source, tokenizer, content))
        if ready is not None:
            return ready
    manifest = read_manifest(source.documents)
    key = _key(config, source, tokenizer, manifest.fingerprint)
    ready = _open(root, key)
    if ready is None:
        try:
            with lock(root / f"{key.key}.lock"):
                ready = _open(root, key)  # another process may have built it meanwhile
                if ready is None:
                    _build(root, key, config, manifest, source, tokenizer)
                    ready = _open(root, key)
        except OSError as error:
            raise ValueError(
                f"cannot keep tokens in {root}: {error.strerror or error}; name another data.cache"
            ) from error
        assert ready is not None
    memo.remember(manifest.fingerprint)
    return ready


def cache_root(config: DataConfig) -> Path:
    """Where tokens are kept."""
    if config.cache is not None:
        return Path(config.cache).expanduser()
    return cache_folder()


def open_folder(folder: Path) -> TokenCache:
    """A cache directory at its present place. Raises ValueError when it is none or is damaged."""
    try:
        meta = parse_json((folder / META).read_text())
        if meta["recipe"]["format"] not in _READ:
            raise ValueError(f"it has format {meta['recipe']['format']}, and this version reads {FORMAT}")
        for split in SPLITS:
            for _, name, dtype, count in _arrays(meta, split):
                size = (folder / name).stat().st_size
                if size != np.dtype(dtype).itemsize * count:
                    raise ValueError(f"{name} has {size} bytes, not {count} x {np.dtype(dtype).itemsize}")
        tokenizer = load_kept(folder / "tokenizer")
        if tokenizer.fingerprint != meta["tokenizer"]:
            raise ValueError("its tokenizer is not the one it was made with")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no sound token files: {error}") from error
    return TokenCache(folder, meta, tokenizer)


def verify(cache: TokenCache, seen: Callable[[int], None] = lambda size: None) -> list[str]:
    """Read every byte and compare with the sums of the meta; returns problems, a line each. `seen` gets byte counts."""
    problems = []
    for split in SPLITS:
        for kind, name, _, _ in _arrays(cache.meta, split):
            crc = 0
            with open(cache.folder / name, "rb") as file:
                while block := file.read(_BLOCK):
                    crc = zlib.crc32(block, crc)
                    seen(len(block))
            known = cache.meta["splits"][split]["crc32"][kind]
            if crc != known:
                problems.append(f"{cache.folder / name}: its CRC-32 is {crc:08x}, and it was written with {known:08x}")
    return problems


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Keep `tokenizer` in `folder`, which does not exist yet: whole or not at all.

    Raises ValueError when loading it again would give another tokenizer.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    _keep(tokenizer, temporary)
    temporary.rename(folder)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Admits one process at a time; the kernel frees the lock when a process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _key(config: DataConfig, source: Source, tokenizer: Tokenizer | None, content: str) -> TokensKey:
    """All that the files of a cache directory depend on."""
    return TokensKey(
        FORMAT,
        content,
        f"bpe {config.bpe_vocab}" if tokenizer is None else tokenizer.fingerprint,
        config.validation,
        None if source.encoder is None else source.encoder.fingerprint,
    )


def _open(root: Path, key: TokensKey) -> TokenCache | None:
    """The cache of `key`, or None when it does not exist or, with a warning, is damaged."""
    folder = root / key.key
    if not folder.is_dir():
        return None
    try:
        ready = open_folder(folder)
        if ready.meta["recipe"] != key.values():
            raise ValueError(f"{folder}: its {META} names other ingredients")
    except ValueError as error:  # with any fault in a cache, it is made again
        log.warning("the token cache is damaged and made again: %s", error)
        return None
    return ready


def _arrays(meta: dict[str, Any], split: str) -> list[tuple[str, str, str, int]]:
    """Kind, file name, dtype and number of elements of the files of `split`."""
    found = []
    for kind in meta["splits"][split]["crc32"]:
        dtype = {"tokens": meta["dtype"], "starts": "int64", "learned": "uint8", "weights": "float32"}[kind]
        count = meta["splits"][split]["documents" if kind == "starts" else "tokens"]
        found.append((kind, f"{split}.{kind}", dtype, count))
    return found


def _map(path: Path, dtype: str, count: int) -> np.ndarray:
    if count == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r", shape=(count,)).view(np.ndarray)


def _build(
    root: Path,
    key: TokensKey,
    config: DataConfig,
    manifest: Manifest,
    source: Source,
    tokenizer: Tokenizer | None,
) -> None:
    folder = root / key.key
    log.info("tokenising %d documents into %s", manifest.documents, folder)
    unfinished = folder.with_suffix(".unfinished")
    unfinished.mkdir(exist_ok=True)  # with the parts of a killed builder
    try:
        tokenizer = tokenizer or _trained(unfinished / "tokenizer", config, manifest)
        _keep(tokenizer, unfinished / "tokenizer")
        meta = write_splits(unfinished, manifest, Recipe(tokenizer, source.encoder, config.validation))
        write_file(unfinished / META, [json.dumps({"recipe": key.values(), **meta}, indent=1).encode()])
        sync_directory(unfinished)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        sync_directory(root)
    except Killed:
        raise
    except ValueError:
        shutil.rmtree(unfinished)  # the texts have changed: no part can be used
        raise


def _trained(kept: Path, config: DataConfig, manifest: Manifest) -> Tokenizer:
    """The BPE of the training documents: the one that a killed builder kept, or a new one."""
    try:
        return load_kept(kept)
    except (OSError, ValueError, KeyError):
        training = (
            text
            for number in range(len(manifest.parts))
            for _, text, digest in manifest.texts(number)
            if manifest.documents == 1 or not is_validation(digest, config.validation)
        )
        return JsonTokenizer.train(training, config.bpe_vocab)


def _keep(tokenizer: Tokenizer, folder: Path) -> None:
    for name, content in tokenizer.files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, [content])
    found = load_kept(folder).fingerprint
    if found != tokenizer.fingerprint:
        raise ValueError(
            f"the tokenizer depends on more than its files: its copy in {folder} is {found}, not "
            f"{tokenizer.fingerprint}. Save it again by transformers' save_pretrained"
        )
