"""The tokens of a source as arrays in files: nothing here reads them whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Array(Protocol):
    """A one-dimensional sequence of integers: an array, or an object that is indexed like one."""

    @property
    def dtype(self) -> np.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, wanted: Any) -> Any:
        """The numbers at the places `wanted`, an int64 array, or in a slice."""
        ...


class Joined:
    """Arrays end to end, as one: `joined[indices]` for an int64 array, `joined[a:b]`, and `len`."""

    def __init__(self, parts: Sequence[Array]) -> None:
        self._parts = tuple(part for part in parts if len(part))
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        self._dtype = np.result_type(*(part.dtype for part in self._parts)) if self._parts else np.dtype(np.uint16)

    @property
    def dtype(self) -> np.dtype:
        return self._dtype

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, wanted: Any) -> np.ndarray:
        if isinstance(wanted, slice):
            return self[np.arange(*wanted.indices(len(self)))]
        wanted = np.asarray(wanted, np.int64)
        owners = np.searchsorted(self._ends, wanted, side="right")
        found = np.empty(wanted.shape, self._dtype)
        for number in np.unique(owners).tolist():
            chosen = owners == number
            part = self._parts[number]
            found[chosen] = part[wanted[chosen] - (self._ends[number] - len(part))]
        return found


class Pieced:
    """Pieces of an array, end to end in any order, as one: `lengths[n]` numbers from place `begins[n]` of it on."""

    def __init__(self, whole: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> None:
        kept = lengths > 0
        self._whole, self._ends = whole, np.cumsum(lengths[kept], dtype=np.int64)
        self._shifts = begins[kept] - (self._ends - lengths[kept])  # from a place here to the place in the array

    @property
    def dtype(self) -> np.dtype:
        return self._whole.dtype

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, wanted: Any) -> np.ndarray:
        if isinstance(wanted, slice):
            wanted = np.arange(*wanted.indices(len(self)))
        wanted = np.asarray(wanted, np.int64)
        return self._whole[wanted + self._shifts[np.searchsorted(self._ends, wanted, side="right")]]


class View:
    """The stretch `begin : end` of an array, as one."""

    def __init__(self, whole: Array, begin: int, end: int) -> None:
        self._whole, self._begin, self._end = whole, begin, end

    @property
    def dtype(self) -> np.dtype:
        return self._whole.dtype

    def __len__(self) -> int:
        return self._end - self._begin

    def __getitem__(self, wanted: Any) -> np.ndarray:
        if isinstance(wanted, slice):
            begin, end, step = wanted.indices(len(self))
            return self._whole[self._begin + begin : self._begin + end : step]
        return self._whole[wanted + self._begin]


def join(parts: Sequence[Array]) -> Array:
    """`parts` as one array; the part itself where there is only one, which is faster."""
    return parts[0] if len(parts) == 1 else Joined(parts)


@dataclass(frozen=True)
class Tokens:
    """One split of a source: its documents end to end, in order."""

    ids: Array  # [tokens], unsigned
    starts: np.ndarray  # int64 [documents], the number of each document's first token; the first is 0
    learned: Array | None = None  # uint8 [tokens], 1 where a token is trained on; None: everywhere
    weights: Array | None = None  # float32 [tokens], factors of their losses; None: 1 where they are trained on
    documents_together: int = 1  # in turn, that are in one row

    def lengths(self) -> np.ndarray:
        """Tokens of each document: int64 `[documents]`."""
        return np.diff(self.starts, append=np.int64(len(self.ids)))
