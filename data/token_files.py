"""Texts that are tokens already: `data.path` names token files, which are mapped where they lie.

    stoker      a folder of `stoker data prepare` (the token cache's own format)
    megatron    NAME.bin and NAME.idx of Megatron-LM's indexed datasets
    npy         NumPy arrays of one dimension
    raw         numbers and nothing else, two or four bytes each (OLMo's .npy files are such)

Only where documents begin is written down, once, in the cache: from the .idx, or by looking for the token that closes a
document. A file's end closes a document too.
"""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stoker.conf.durable import sync_directory
from stoker.conf.schema import DataConfig
from stoker.data.build import write_file
from stoker.data.cache import META, TokenCache, cache_root, lock, open_folder
from stoker.data.documents import Document, stamp
from stoker.data.keys import digest, file_digest
from stoker.data.manifest import Memo
from stoker.data.pool import each
from stoker.data.text import files_of, known_args
from stoker.data.tokens import Tokens, View, join

_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_SUFFIXES = (".bin", ".npy", ".u16", ".u32", ".tokens")
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10  # of each file that are read for its fingerprint
_BLOCK = 16 << 20  # tokens looked through at a time


@dataclass(frozen=True)
class TokenFiles:
    """A source of tokens. `cache` is set for our own format, which has splits and a tokenizer."""

    content: str  # fingerprint: sizes, and samples of every file
    cache: TokenCache | None
    whole: Tokens | None  # of foreign files: all documents
    reading: str | None = None  # fingerprint of what else decides where documents begin: indexes, the format

    def tokens(self, split: str, validation: float) -> Tokens:
        """The documents of `train` or `validation`; of foreign files the last are kept for validation."""
        if self.cache is not None:
            return self.cache.tokens(split)
        assert self.whole is not None
        starts, ids = self.whole.starts, self.whole.ids
        kept = len(starts) - int(len(starts) * validation)
        cut = int(starts[kept]) if kept < len(starts) else len(ids)
        if split == "train":
            return Tokens(View(ids, 0, cut), starts[:kept])
        return Tokens(View(ids, cut, len(ids)), starts[kept:] - cut)


def open_source(config: DataConfig) -> TokenFiles:
    """The token files at `data.path`.

    `data.args.format` is `auto`, `stoker`, `megatron`, `npy` or `raw`; `data.args.dtype` the type of raw numbers
    (default `uint16`); `data.args.end_of_document` the id that closes a document in npy and raw files (default: every
    file is one document). Raises ValueError for files that are not what they should be.
    """
    args = known_args(config, "data=tokens", format="auto", dtype="uint16", end_of_document=None, pattern="*")
    root = Path(config.path) if config.path is not None else None
    if root is not None and args["format"] in ("auto", "stoker") and (root / META).exists():
        cache = open_folder(root)
        sums = {split: cache.meta["splits"][split]["crc32"] for split in cache.meta["splits"]}
        return TokenFiles(digest([cache.content, cache.meta["tokenizer"], sums]), cache, None)
    if args["format"] == "stoker":
        raise ValueError(f"data.path={root} is no folder of token files: it has no {META}")
    paths = [path for _, path in files_of(config, "data=tokens", args["pattern"], keep=lambda n: n.endswith(_SUFFIXES))]
    files = [_open(path, args) for path in paths]
    content, reading = _content(config, paths, args), _reading([index for _, index in files if index is not None], args)
    known = content if reading is None else digest([content, reading])
    starts = _starts(config, known, files, args)
    return TokenFiles(content, None, Tokens(join([ids for ids, _ in files]), starts), reading)


def largest_id(tokens: Tokens) -> int:
    """The largest of samples of the ids: enough to notice that they are another tokenizer's."""
    places = np.linspace(0, max(len(tokens.ids) - 1, 0), 1 << 16).astype(np.int64)
    return int(np.max(tokens.ids[places], initial=0)) if len(tokens.ids) else 0


def _open(path: Path, args: dict[str, Any]) -> tuple[np.ndarray, Path | None]:
    """The mapped ids of a file, and its index if it is Megatron's. Raises ValueError when it is not of the format."""
    stamp(path)
    wanted, index = args["format"], path.with_suffix(".idx")
    if wanted == "megatron" or (wanted == "auto" and path.suffix == ".bin" and index.exists()):
        return _map(path, _megatron(index)[0]), index
    with open(path, "rb") as file:
        is_npy = file.read(6) == b"\x93NUMPY"
    if wanted == "npy" or (wanted == "auto" and is_npy):
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} is no NumPy array: {error}") from error
        if ids.ndim != 1 or ids.dtype.kind not in "ui":
            raise ValueError(f"{path} holds {ids.dtype} of shape {ids.shape}, not a line of whole numbers")
        return ids.view(np.ndarray), None
    if args["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"data.args.dtype={args['dtype']}: raw tokens are uint16 or uint32")
    return _map(path, args["dtype"]), None


def _map(path: Path, dtype: str) -> np.ndarray:
    size, item = path.stat().st_size, np.dtype(dtype).itemsize
    if size % item:
        raise ValueError(f"{path} has {size} bytes, no multiple of {item}: it is cut short, or not of {dtype}")
    return np.memmap(path, dtype, "r").view(np.ndarray) if size else np.empty(0, dtype)


def _megatron(index: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """dtype, tokens of each sequence and first sequence of each document, as an .idx file says."""
    try:
        content = np.memmap(index, np.uint8, "r").view(np.ndarray)
        if content[:9].tobytes() != _MAGIC:
            raise ValueError("it does not begin as one")
        version, code, sequences, documents = struct.unpack("<QBQQ", content[9:34].tobytes())
        if version != 1 or code not in _MEGATRON_TYPES:
            raise ValueError(f"version {version}, dtype {code}")
        at = 34 + sequences * 12
        sizes: np.ndarray = content[34 : 34 + sequences * 4].view("<i4")
        firsts: np.ndarray = content[at : at + documents * 8].view("<i8")
        if len(sizes) != sequences or len(firsts) != documents:
            raise ValueError("it is cut short")
    except (OSError, ValueError, struct.error) as error:
        raise ValueError(f"{index} is no index of Megatron's: {error}") from error
    return _MEGATRON_TYPES[code], sizes, firsts


def _starts(
    config: DataConfig, content: str, files: list[tuple[np.ndarray, Path | None]], args: dict[str, Any]
) -> np.ndarray:
    """Where documents begin in all files end to end, mapped from the cache; written there first if need be."""
    root = cache_root(config)
    folder = root / f"starts-{content}"
    if not _sound(folder):
        try:
            with lock(folder.with_suffix(".lock")):
                if not _sound(folder):
                    _write_starts(folder, files, args["end_of_document"])
        except OSError as error:
            problem = f"cannot keep an index in {root}: {error.strerror or error}"
            raise ValueError(f"{problem}; name another data.cache") from error
    count = json.loads((folder / META).read_text())["documents"]
    return np.memmap(folder / "starts", np.int64, "r").view(np.ndarray) if count else np.empty(0, np.int64)


def _sound(folder: Path) -> bool:
    try:
        return (folder / "starts").stat().st_size == 8 * json.loads((folder / META).read_text())["documents"]
    except (OSError, ValueError, KeyError):
        return False


def _write_starts(folder: Path, files: list[tuple[np.ndarray, Path | None]], end: int | None) -> None:
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a builder that was killed
    unfinished.mkdir(parents=True)
    found = each(lambda number: _begins(*files[number], end), [ids.nbytes for ids, _ in files], "finding documents")
    firsts = np.cumsum([0, *(len(ids) for ids, _ in files)])
    starts = np.concatenate([begins + first for begins, first in zip(found, firsts, strict=False)])
    write_file(unfinished / "starts", [starts.astype(np.int64).tobytes()])
    write_file(unfinished / META, [json.dumps({"documents": len(starts)}).encode()])
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    sync_directory(folder.parent)


def _begins(ids: np.ndarray, index: Path | None, end: int | None) -> np.ndarray:
    """The first token of each document of a file that has any tokens: int64."""
    if index is not None:
        _, sizes, firsts = _megatron(index)
        ends = np.cumsum(sizes, dtype=np.int64)
        if (int(ends[-1]) if len(ends) else 0) != len(ids):
            raise ValueError(f"{index} speaks of {ends[-1] if len(ends) else 0} tokens, and its .bin has {len(ids)}")
        edges = np.concatenate([[0], ends])[firsts]
        return np.unique(edges[edges < len(ids)])
    if end is None or not len(ids):
        return np.zeros(min(len(ids), 1), np.int64)
    blocks = range(0, len(ids), _BLOCK)
    after = np.concatenate([np.flatnonzero(ids[at : at + _BLOCK] == end) + at + 1 for at in blocks])
    return np.concatenate([[0], after[after < len(ids)]])


def _content(config: DataConfig, paths: list[Path], args: dict[str, Any]) -> str:
    """The fingerprint of the files, remembered for their stamps: not every rank reads the samples at every start."""
    documents = [Document(f"{path} as tokens {sorted(args.items())}", str, stamp(path)[0]) for path in paths]
    memo = Memo(cache_root(config) / "versions", documents)
    content = memo.recall()
    if content is None:
        content = digest([[_sampled(path) for path in paths], args["end_of_document"], args["dtype"]])
        memo.remember(content)
    return content


def _reading(indexes: list[Path], args: dict[str, Any]) -> str | None:
    """What decides, besides the files of ids, which documents there are; None where nothing does."""
    if not indexes and args["format"] == "auto":
        return None
    return digest([[_sampled(path) for path in indexes], args["format"]])


def _sampled(path: Path) -> list[Any]:
    """The size of a file and a hash of samples of it."""
    size = path.stat().st_size
    with open(path, "rb") as file:

        def sample(at: int) -> bytes:
            file.seek(at)
            return file.read(_SAMPLE_BYTES)

        places = np.linspace(0, max(size - _SAMPLE_BYTES, 0), _SAMPLES).astype(np.int64).tolist()
        return [size, file_digest(map(sample, places))]
