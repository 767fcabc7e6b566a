"""The index of a tar archive: positions of its samples, members in no sample, and the position of damage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stoker.conf.records import parse_json
from stoker.data.streaming.tar import Broken, Bytes, Left, Reader, Sample, samples

_FORMAT = 2


@dataclass(frozen=True)
class Index:
    """The samples of an archive, the members in no sample, and the byte from which on it is damaged, if any."""

    samples: tuple[Sample, ...]
    left: tuple[Left, ...] = ()
    broken: tuple[int, str] | None = None  # byte, reason

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": [[s.key, s.begin, s.end, s.check, list(s.extensions)] for s in self.samples],
            "left": [[left.byte, left.name, left.reason, left.extension] for left in self.left],
            "broken": self.broken,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Index:
        found = tuple(Sample(key, begin, end, check, tuple(rest)) for key, begin, end, check, rest in values["samples"])
        left = tuple(Left(*entry) for entry in values["left"])
        return cls(found, left, None if values["broken"] is None else (values["broken"][0], values["broken"][1]))

    def fits(self, size: int) -> bool:
        """Whether the samples are one after the other in an archive of `size` bytes."""
        ends = [0, *(byte for sample in self.samples for byte in (sample.begin, sample.end)), size]
        places = [0, *(left.byte for left in self.left), size]
        broken = size if self.broken is None else self.broken[0]
        return 0 <= broken <= size and all(a <= b for numbers in (ends, places) for a, b in pairwise(numbers))


def build_index(file: Bytes) -> Index:
    """Read an archive through. In one that is cut short, a last sample with fewer files than the first is lost too.

    Raises Compressed.
    """
    found: list[Sample] = []
    left: list[Left] = []
    try:
        found.extend(one.sample for one in samples(Reader(file, keep=False, left=left.append)))
    except Broken as error:
        if not error.whole and len(found) > 1 and len(found[-1].extensions) < len(found[0].extensions):
            last = found.pop()
            return Index(
                tuple(found), tuple(left), (last.begin, f"the last sample lacks files, and then {error.reason}")
            )
        return Index(tuple(found), tuple(left), (error.byte, error.reason))
    return Index(tuple(found), tuple(left))


def dump(index: Index, size: int) -> bytes:
    """`index` of an archive of `size` bytes, as a file beside it."""
    return json.dumps({"format": _FORMAT, "size": size, **index.to_json()}).encode()


def load(data: bytes, size: int) -> Index | None:
    """The inverse of `dump`; None for anything but an index of an archive of `size` bytes."""
    try:
        values = parse_json(data)
        if values["format"] != _FORMAT or values["size"] != size:
            return None
        index = Index.from_json(values)
        return index if index.fits(size) else None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
