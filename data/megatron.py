"""Indexed datasets of Megatron-LM: NAME.bin holds ids, NAME.idx the positions of sequences in it and the documents.

    magic  version  dtype code  sequences S  documents D   9 + 8 + 1 + 8 + 8 bytes
    tokens of each sequence                                int32 [S]
    where each begins in the .bin, in bytes                int64 [S]
    the first sequence of each document, and S at the end  int64 [D]
    modes, in data sets of several modalities              int8 [S]

Sequences may be in any order, overlap, and leave parts of the .bin out (`megatron/core/datasets/indexed_dataset.py`).
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stoker.data.tokens import Array, Pieced

log = logging.getLogger(__name__)

_MAGIC, _LEGACY = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_BEGIN = len(_MAGIC) + _HEADER.size
_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}


@dataclass(frozen=True)
class _Index:
    dtype: np.dtype
    sizes: np.ndarray  # int32 [sequences], tokens
    pointers: np.ndarray  # int64 [sequences], bytes of the .bin
    firsts: np.ndarray  # int64 [documents + 1], sequences


def open_indexed(path: Path, index: Path) -> tuple[Array, np.ndarray]:
    """The ids of the sequences of `index`, which lie in `path`, in the index's order; and the first token of each
    document that has any, int64. Raises ValueError, with file and place, for files that contradict themselves or each
    other."""
    if not index.is_file():
        raise ValueError(f"{path} has no index: {index} does not exist")
    try:
        found = _read(index)
    except (OSError, ValueError, struct.error) as error:
        raise ValueError(f"{index} is no index of Megatron's: {error}") from error
    size, item = path.stat().st_size, found.dtype.itemsize
    if size % item:
        raise ValueError(f"{path} has {size} bytes, no multiple of {item}: it is cut short, or not of {found.dtype}")
    ends = found.pointers + found.sizes.astype(np.int64) * item
    _check_places(path, index, found, ends, size)
    ids = np.memmap(path, found.dtype, "r").view(np.ndarray) if size else np.empty(0, found.dtype)
    after = np.concatenate([[0], np.cumsum(found.sizes, dtype=np.int64)])  # first token of each sequence, as listed
    edges = after[found.firsts]  # of documents without tokens it holds the same place again
    starts = edges[:-1][np.diff(edges) > 0]
    if np.array_equal(ends[:-1], found.pointers[1:]) and (not len(ends) or found.pointers[0] == 0):
        return ids, starts
    if missing := len(ids) - _covered(found.pointers, ends) // item:
        log.warning("%s: %d of its %d tokens are in no sequence of %s", path, missing, len(ids), index.name)
    return Pieced(ids, found.pointers // item, found.sizes.astype(np.int64)), starts


def _read(index: Path) -> _Index:
    size = index.stat().st_size
    with open(index, "rb") as file:
        head = file.read(_BEGIN)
    if head.startswith(_LEGACY):
        raise ValueError("it is one of its old kind (TNTIDX), which Megatron-LM no longer reads: convert the data")
    if not head.startswith(_MAGIC):
        raise ValueError("it does not begin as one")
    version, code, sequences, documents = _HEADER.unpack_from(head, len(_MAGIC))
    if version != 1 or code not in _TYPES:
        raise ValueError(f"version {version}, dtype {code}")
    dtype = np.dtype(_TYPES[code])
    if dtype.kind not in "ui":
        raise ValueError(f"its dtype is {dtype}, and token ids are whole numbers")
    at = np.cumsum([_BEGIN, *(int(count) * width for count, width in [(sequences, 4), (sequences, 8), (documents, 8)])])
    end = _BEGIN + 12 * sequences + 8 * documents
    if size not in (end, end + sequences):
        what = "it is cut short" if size < end else f"{size - end} bytes follow"
        raise ValueError(
            f"{sequences} sequences and {documents} documents end at byte {end}, and it has {size}: {what}"
        )
    content = np.memmap(index, np.uint8, "r").view(np.ndarray)
    if size > end and content[end:].any():
        raise ValueError("it has sequences of other modes than text")
    found = _Index(
        dtype,
        content[at[0] : at[1]].view("<i4"),
        content[at[1] : at[2]].view("<i8"),
        content[at[2] : at[3]].view("<i8"),
    )
    firsts = found.firsts
    if not len(firsts) or firsts[0] != 0 or firsts[-1] != sequences or (np.diff(firsts) < 0).any():
        raise ValueError(f"the firsts of its documents do not rise from 0 to its {sequences} sequences")
    return found


def _check_places(path: Path, index: Path, found: _Index, ends: np.ndarray, size: int) -> None:
    """Raises ValueError for a sequence outside the .bin, and for bytes after the last one."""
    wrong = (found.sizes < 0) | (found.pointers < 0) | (found.pointers % found.dtype.itemsize != 0) | (ends > size)
    if wrong.any():
        at = int(np.argmax(wrong))
        where = f"sequence {at} of {found.sizes[at]} tokens from byte {found.pointers[at]} on"
        raise ValueError(f"{index} lists {where}, and {path.name} has {size} bytes")
    last = int(ends.max(initial=0))
    if last < size:
        raise ValueError(f"{path}: {size - last} bytes from byte {last} on come after every sequence of {index.name}")


def _covered(begins: np.ndarray, ends: np.ndarray) -> int:
    """Bytes that lie in at least one of the spans."""
    order = np.argsort(begins, kind="stable")
    begins, reached = begins[order], np.maximum.accumulate(ends[order])
    before = np.concatenate([[0], reached[:-1]])
    return int(np.maximum(reached - np.maximum(begins, before), 0).sum())
