"""The files of foreign token data. Width and format of ids come from a header or from the user: a width is never
guessed, because ids read in a wrong width are valid ids too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stoker.data import npy
from stoker.data.documents import stamp
from stoker.data.megatron import open_indexed
from stoker.data.tokens import Array

SUFFIXES = (".bin", ".npy", ".u16", ".u32", ".tokens")
FORMATS = ("auto", "stoker", "megatron", "npy", "llm.c", "raw")
DTYPES = ("uint8", "uint16", "int32", "uint32", "int64", "uint64")  # of raw numbers
_NAMED = {".u16": "uint16", ".u32": "uint32"}  # endings that state a width
# llm.c: 256 numbers of four bytes (magic, version, tokens), then the ids.
_LLM_C = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
_LLM_C_HEADER = 1024  # bytes


@dataclass(frozen=True)
class TokenFile:
    path: Path
    ids: Array
    starts: np.ndarray | None = None  # int64: the first token of each document, where an index has it
    stated: bool = False  # the width of the ids was set by the user


def open_file(path: Path, args: dict[str, Any]) -> TokenFile:
    """A file of ids, by `data.args` or its header. Raises ValueError, with file and place, for others."""
    stamp(path)
    wanted = args["format"]
    if wanted == "megatron" or (wanted == "auto" and path.suffix == ".bin" and path.with_suffix(".idx").exists()):
        return TokenFile(path, *open_indexed(path, path.with_suffix(".idx")))
    with open(path, "rb") as file:
        head = file.read(_LLM_C_HEADER)
    found = "npy" if head.startswith(npy.MAGIC) else "llm.c" if _llm_c(head) is not None else "raw"
    if wanted not in ("auto", found):
        raise ValueError(f"{path} is not a file of data.args.format={wanted}: it begins like one of format={found}")
    if found == "npy":
        return TokenFile(path, _open_npy(path))
    if found == "llm.c":
        return TokenFile(path, _open_llm_c(path, head))
    return TokenFile(path, _map(path, _stated_dtype(path, args["dtype"])), stated=True)


def _stated_dtype(path: Path, dtype: str | None) -> str:
    named = _NAMED.get(path.suffix)
    if dtype is not None and named not in (None, dtype):
        raise ValueError(f"{path}: data.args.dtype={dtype}, but its name means {named}")
    found = dtype or named
    if found is None:
        raise ValueError(
            f"{path} has no known header, so the width of its ids is unknown: set data.args.dtype=uint16 "
            f"(nanoGPT's .bin), uint32 (many .npy of OLMo), or another of {', '.join(DTYPES)}. A .bin of Megatron-LM "
            f"needs its {path.stem}.idx beside it"
        )
    return found


def _map(path: Path, dtype: str, begin: int = 0) -> np.ndarray:
    size, item = path.stat().st_size - begin, np.dtype(dtype).itemsize
    if size % item:
        raise ValueError(f"{path} has {size} bytes of ids, no multiple of {item}: it is cut short, or not of {dtype}")
    return np.memmap(path, dtype, "r", offset=begin).view(np.ndarray) if size else np.empty(0, dtype)


def _open_npy(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            dtype, shape, begin = npy.header(file, path.stat().st_size)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no NumPy array: {error}") from error
    if len(shape) != 1 or dtype.kind not in "ui":
        raise ValueError(f"{path} holds {dtype} of shape {shape}, not a line of whole numbers")
    return np.memmap(path, dtype, "r", offset=begin).view(np.ndarray) if shape[0] else np.empty(0, dtype)


def _llm_c(head: bytes) -> tuple[int, int, int] | None:
    """Magic, version and tokens of a header of llm.c; None for any other."""
    if len(head) < _LLM_C_HEADER:
        return None
    magic, version, tokens = np.frombuffer(head, "<i4", 3).tolist()
    return (magic, version, tokens) if magic in {known for known, _ in _LLM_C} else None


def _open_llm_c(path: Path, head: bytes) -> np.ndarray:
    found = _llm_c(head)
    assert found is not None
    magic, version, tokens = found
    if (magic, version) not in _LLM_C:
        raise ValueError(f"{path} has llm.c's header {magic} of version {version}: supported are {[*_LLM_C]}")
    ids = _map(path, _LLM_C[magic, version], _LLM_C_HEADER)
    if len(ids) != tokens:
        raise ValueError(
            f"{path} has a header for {tokens} tokens, and {len(ids)} follow it: it is cut short, or joined"
        )
    return ids
