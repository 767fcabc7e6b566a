"""Data that are tokens already: `data.path` names token files, which are mapped at their place.

    stoker      a folder of `stoker data prepare` (the token cache's own format)
    megatron    NAME.bin and NAME.idx of Megatron-LM's indexed datasets         megatron.py
    npy         NumPy arrays of one dimension                                   npy.py
    llm.c       its .bin, with llm.c's header                              token_formats.py
    raw         numbers only, of the width that the user states

The cache keeps: the first token of each document, from the .idx or by a search for the token that closes a document (a
file's end closes one too), and the smallest and the largest id.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stoker.conf.durable import sync_directory
from stoker.conf.records import parse_json
from stoker.conf.schema import DataConfig
from stoker.data.build import write_file
from stoker.data.cache import META, TokenCache, cache_root, lock, open_folder
from stoker.data.documents import Document, stamp
from stoker.data.keys import digest, file_digest
from stoker.data.manifest import Memo
from stoker.data.pool import each
from stoker.data.text import files_of, known_args
from stoker.data.token_formats import DTYPES, FORMATS, SUFFIXES, TokenFile, open_file
from stoker.data.tokens import Tokens, View, join

_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10  # of each file that are read for its fingerprint
_BLOCK = 16 << 20  # tokens scanned at a time, an even number
_TELLING = 64  # tokens of which every second one is not 0 by chance


@dataclass(frozen=True)
class TokenFiles:
    """A source of tokens. `cache` is set for our own format, which has splits and a tokenizer."""

    content: str  # fingerprint: sizes, and samples of every file
    cache: TokenCache | None
    whole: Tokens | None  # of foreign files: all documents
    reading: str | None = None  # fingerprint of other inputs that decide where documents begin: indexes, the format
    largest: tuple[int, str] | None = None  # of foreign files: the largest id, and its position
    narrowest: tuple[str, str] | None = None  # of foreign files: the narrowest dtype, and a file that has it

    @property
    def documents(self) -> int:
        """How many documents there are, of both splits."""
        return self.cache.documents if self.cache is not None else len(self._foreign.starts)

    @property
    def is_chat(self) -> bool:
        """Whether some tokens are not worth learning."""
        return self.cache is not None and self.cache.tokens("train").learned is not None

    @property
    def _foreign(self) -> Tokens:
        assert self.whole is not None
        return self.whole

    def tokens(self, split: str, validation: float) -> Tokens:
        """The documents of `train`, of `validation` or `all`; of foreign files the last are kept for validation."""
        if self.cache is not None:
            return self.cache.tokens(split)
        if split == "all":
            return self._foreign
        starts, ids = self._foreign.starts, self._foreign.ids
        kept = len(starts) - int(len(starts) * validation)
        cut = int(starts[kept]) if kept < len(starts) else len(ids)
        if split == "train":
            return Tokens(View(ids, 0, cut), starts[:kept])
        return Tokens(View(ids, cut, len(ids)), starts[kept:] - cut)

    def refuse_vocabulary(self, size: int) -> None:
        """Raises ValueError, with file and place, where a vocabulary of `size` ids does not match the ids."""
        if self.cache is not None:
            largest = _sampled_largest(self.cache.tokens("train"))
            where = f"{self.cache.folder} holds token {largest}"
        else:
            largest, place = self.largest or (-1, "")
            where = f"{place} is {largest}"
        if largest >= size:
            raise ValueError(f"{where}, but the vocabulary has {size}: the tokens are of another tokenizer or dtype")
        if self.narrowest is not None and np.iinfo(self.narrowest[0]).bits == 16:
            dtype, path = self.narrowest
            if np.iinfo(dtype).max + 1 < size:
                raise ValueError(
                    f"{path} holds {dtype}, which cannot hold more than {np.iinfo(dtype).max + 1} ids, and the "
                    f"vocabulary has {size}: the tokens are of another tokenizer or dtype"
                )


def open_source(config: DataConfig) -> TokenFiles:
    """The token files at `data.path`.

    `data.args.format` is `auto`, `stoker`, `megatron`, `npy`, `llm.c` or `raw`; `data.args.dtype` the type of the ids
    of files without a header, which must be stated; `data.args.end_of_document` the id that closes a document in files
    without an index (default: every file is one document). Raises ValueError for files of another format.
    """
    args = known_args(config, "data=tokens", format="auto", dtype=None, end_of_document=None, pattern="*")
    _check_args(args)
    root = Path(config.path) if config.path is not None else None
    if root is not None and args["format"] in ("auto", "stoker") and (root / META).exists():
        cache = open_folder(root)
        sums = {split: cache.meta["splits"][split]["crc32"] for split in cache.meta["splits"]}
        return TokenFiles(digest([cache.content, cache.meta["tokenizer"], sums]), cache, None)
    if args["format"] == "stoker":
        raise ValueError(f"data.path={root} is no folder of token files: it has no {META}")
    found = files_of(config, "data=tokens", args["pattern"], keep=lambda n: n.endswith((*SUFFIXES, ".idx")))
    for _, path in found:
        if path.suffix == ".idx" and not path.with_suffix(".bin").exists():
            raise ValueError(f"{path} has no ids: {path.stem}.bin is missing beside it")
    paths = [path for _, path in found if path.suffix != ".idx"]
    if not paths:
        raise ValueError(f"data.path={root}: name the .bin, or the folder of both")
    files = [open_file(path, args) for path in paths]
    content, reading = _content(config, files, args), _reading(files, args)
    known = content if reading is None else digest([content, reading])
    starts, meta = _starts(config, known, files, args)
    if meta["smallest"] is not None and meta["smallest"][0] < 0:
        number, file, place = meta["smallest"]
        raise ValueError(f"{paths[file]}, token {place} is {number}: ids are not negative")
    largest = None
    if meta["largest"] is not None:
        number, file, place = meta["largest"]
        largest = number, f"{paths[file]}, token {place}"
    narrowest = min(files, key=lambda file: file.ids.dtype.itemsize)
    return TokenFiles(
        content,
        None,
        Tokens(join([file.ids for file in files]), starts),
        reading,
        largest,
        (narrowest.ids.dtype.name, str(narrowest.path)),
    )


def _check_args(args: dict[str, Any]) -> None:
    for name, known in (("format", FORMATS), ("dtype", (None, *DTYPES))):
        if args[name] not in known:
            raise ValueError(f"data.args.{name}={args[name]}: choose from {', '.join(filter(None, known))}")
    end = args["end_of_document"]
    if end is not None and (not isinstance(end, int) or isinstance(end, bool) or end < 0):
        raise ValueError(f"data.args.end_of_document={end}: must be the id of a token")


def _sampled_largest(tokens: Tokens) -> int:
    """The largest of samples of the ids of Stoker's format, whose tokenizer is known."""
    places = np.linspace(0, max(len(tokens.ids) - 1, 0), 1 << 16).astype(np.int64)
    return int(np.max(tokens.ids[places], initial=0)) if len(tokens.ids) else 0


def _starts(
    config: DataConfig, content: str, files: Sequence[TokenFile], args: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """The first token of each document in all files end to end, mapped from the cache, and further facts about the ids.

    Every id is read, and the result written to the cache, unless it exists.
    """
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
    meta = parse_json((folder / META).read_text())
    if not meta["documents"]:
        return np.empty(0, np.int64), meta
    return np.memmap(folder / "starts", np.int64, "r").view(np.ndarray), meta


def _sound(folder: Path) -> bool:
    try:
        meta = parse_json((folder / META).read_text())
        return {"smallest", "largest"} <= {*meta} and (folder / "starts").stat().st_size == 8 * meta["documents"]
    except (OSError, ValueError, KeyError):
        return False


@dataclass(frozen=True)
class _Scan:
    """The result of reading all ids of a file."""

    starts: np.ndarray  # int64: the first token of each document
    smallest: tuple[int, int] | None  # an id and its place; None without any
    largest: tuple[int, int] | None


def _write_starts(folder: Path, files: Sequence[TokenFile], end: int | None) -> None:
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a builder that was killed
    unfinished.mkdir(parents=True)
    sizes = [len(file.ids) * file.ids.dtype.itemsize for file in files]
    scans = each(lambda number: _scan(files[number], end), sizes, "reading all tokens")
    firsts = np.cumsum([0, *(len(file.ids) for file in files)])
    starts = np.concatenate([scan.starts + first for scan, first in zip(scans, firsts, strict=False)])
    smallest = [(scan.smallest[0], number, scan.smallest[1]) for number, scan in enumerate(scans) if scan.smallest]
    largest = [(scan.largest[0], number, scan.largest[1]) for number, scan in enumerate(scans) if scan.largest]
    meta = {
        "documents": len(starts),
        "smallest": min(smallest, default=None),
        "largest": max(largest, default=None, key=lambda found: found[0]),
    }
    write_file(unfinished / "starts", [starts.astype(np.int64).tobytes()])
    write_file(unfinished / META, [json.dumps(meta).encode()])
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    sync_directory(folder.parent)


def _scan(file: TokenFile, end: int | None) -> _Scan:
    """Read all ids of a file. Raises ValueError if they look like others of twice the width."""
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    after = [np.zeros(1, np.int64)]
    odd = even = False  # is there an id but 0 at an odd, or an even, place?
    for at in range(0, len(file.ids), _BLOCK):
        ids = file.ids[at : at + _BLOCK]
        least, most = int(np.argmin(ids)), int(np.argmax(ids))
        smallest = min(smallest or (int(ids[least]), at + least), (int(ids[least]), at + least))
        if largest is None or int(ids[most]) > largest[0]:
            largest = int(ids[most]), at + most
        odd, even = odd or bool(ids[1::2].any()), even or bool(ids[::2].any())
        if file.starts is None and end is not None:
            after.append(np.flatnonzero(ids == end) + at + 1)
    width = file.ids.dtype.itemsize
    if file.stated and even and not odd and width < 8 and len(file.ids) >= _TELLING:
        raise ValueError(
            f"{file.path}: read as {file.ids.dtype}, every second id is 0, as if they had {2 * width} bytes each: "
            f"state another data.args.dtype, such as uint{16 * width}"
        )
    starts = np.concatenate(after) if file.starts is None else file.starts
    return _Scan(starts[starts < len(file.ids)], smallest, largest)


def _content(config: DataConfig, files: Sequence[TokenFile], args: dict[str, Any]) -> str:
    """The fingerprint of the files, kept for their stamps, so that not every rank reads the samples at every start."""
    paths = [file.path for file in files]
    documents = [Document(f"{path} as tokens {sorted(args.items())}", str, stamp(path)[0]) for path in paths]
    memo = Memo(cache_root(config) / "versions", documents)
    content = memo.recall()
    if content is None:
        # Earlier versions assumed uint16 by default: the fingerprints of files that they read correctly are the same.
        dtype = args["dtype"] or next((file.ids.dtype.name for file in files if file.stated), "uint16")
        content = digest([[_sampled(path) for path in paths], args["end_of_document"], dtype])
        memo.remember(content)
    return content


def _reading(files: Sequence[TokenFile], args: dict[str, Any]) -> str | None:
    """The inputs beside the files of ids that decide the documents; None without any."""
    indexes = [file.path.with_suffix(".idx") for file in files if file.starts is not None]
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
