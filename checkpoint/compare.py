"""Differences between two checkpoints: their tensors, one at a time, and their states, value by value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.checkpoint.reader import TensorReader
from stoker.checkpoint.stored import read_state
from stoker.parallel.dtypes import DTYPES
from stoker.parallel.shards import PARAMETER

MISSING = "-"  # the text of a value that one side does not have


@dataclass(frozen=True)
class TensorChange:
    """A tensor that is not the same, bit for bit, in both."""

    kind: str  # as in `stoker.parallel.shards`
    name: str
    relative: float | None  # |second - first| / |first|, L2 norms in float64; None where they cannot be subtracted
    what: str  # for people: "changed", "only in the first", "F32 (4, 2) -> F32 (4, 3)"


@dataclass(frozen=True)
class ValueChange:
    key: str  # dotted
    first: str
    second: str


@dataclass(frozen=True)
class Difference:
    tensors: list[
        TensorChange
    ]  # parameters, then other kinds; of each those that cannot be subtracted, then the most changed
    equal_tensors: int
    kinds: list[str]  # of all tensors of both, those that were left out too
    config: list[ValueChange]
    state: list[ValueChange]  # without the config

    @property
    def empty(self) -> bool:
        return not (self.tensors or self.config or self.state)


def compare(
    first: Path,
    second: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    kinds: Collection[str] = (),
) -> Difference:
    """Reads all of both, or the tensors of some `kinds`, holding two tensors in memory.

    `progress` is called with the tensors compared so far, and in all. Raises DamagedCheckpoint at the
    first damage.
    """
    old, new = read_state(first), read_state(second)
    config = list(_changes(old.pop("config", {}), new.pop("config", {}), ""))
    state = list(_changes(old, new, ""))
    changes, equal = [], 0
    with TensorReader(first) as a, TensorReader(second) as b:
        every = list(dict.fromkeys([*a.stored.tensors, *b.stored.tensors]))
        keys = [(kind, name) for kind, name in every if not kinds or kind in kinds]
        for number, (kind, name) in enumerate(keys, 1):
            change = _tensor_change(a, b, kind, name)
            equal += change is None
            changes += [change] if change else []
            progress(number, len(keys))
    changes.sort(key=_place)
    return Difference(changes, equal, sorted({kind for kind, _ in every}), config, state)


def _place(change: TensorChange) -> tuple[bool, str, bool, float, str]:
    measured = change.relative is not None
    return change.kind != PARAMETER, change.kind, measured, -(change.relative or 0.0), change.name


def _tensor_change(a: TensorReader, b: TensorReader, kind: str, name: str) -> TensorChange | None:
    old, new = (reader.stored.tensors.get((kind, name)) for reader in (a, b))
    if old is None or new is None:
        return TensorChange(kind, name, None, "only in the second" if old is None else "only in the first")
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return TensorChange(kind, name, None, f"{old.dtype} {old.shape} -> {new.dtype} {new.shape}")
    first, second = a.read(name, kind), b.read(name, kind)
    if torch.equal(_raw(first), _raw(second)):
        return None
    if not DTYPES[old.dtype].is_floating_point:
        return TensorChange(kind, name, None, f"{int((first != second).sum()):,} of {first.numel():,} elements changed")
    norm, change = first.double().norm().item(), (second.double() - first.double()).norm().item()
    return TensorChange(kind, name, change / norm if norm else float("inf"), "changed")


def _raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _changes(first: Any, second: Any, key: str) -> Iterator[ValueChange]:
    if isinstance(first, dict) and isinstance(second, dict):
        for name in sorted({*first, *second}):
            yield from _changes(first.get(name, _NOTHING), second.get(name, _NOTHING), f"{key}.{name}" if key else name)
    elif first != second:
        yield ValueChange(key, _text(first), _text(second))


_NOTHING = object()


def _text(value: Any) -> str:
    if value is _NOTHING:
        return MISSING
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
