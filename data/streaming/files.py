"""Text files: a split is a run of neighbouring files of about the same total size, a document is a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stoker.data.remote import Damaged, Loss, Report
from stoker.data.remote.shards import Shard
from stoker.data.remote.store import Store
from stoker.data.streaming.splits import Content


@dataclass(frozen=True)
class Files:
    """Units over whole files, each one document of UTF-8 text."""

    shards: Sequence[Shard]
    names: Sequence[str]  # of each file, below the folder
    firsts: np.ndarray  # int64 [splits + 1]: the first file of each split, and how many files there are

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        lines = "\n".join(f"{name} {shard.size}" for name, shard in zip(self.names, self.shards, strict=True))
        digest = hashlib.sha256(lines.encode() + self.firsts.tobytes()).hexdigest()[:32]
        return {"format": "text", "shards": digest}

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def read(self, split: int, store: Store, report: Report) -> Iterator[tuple[int, Content]]:
        for number, place in enumerate(range(self.firsts[split], self.firsts[split + 1])):
            shard = self.shards[place]
            try:
                yield number, _text(shard, store.read(shard, 0, shard.size))
            except Damaged as error:
                report(Loss(error, number, 1))


def group(sizes: Sequence[int], split_bytes: int) -> np.ndarray:
    """The first file of each split: a split ends where it has reached `split_bytes`. int64 `[splits + 1]`."""
    firsts, held = [0], 0
    for place, size in enumerate(sizes):
        if held and held + size > split_bytes:
            firsts.append(place)
            held = 0
        held += size
    return np.array([*firsts, len(sizes)], np.int64)


def _text(shard: Shard, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"not UTF-8: byte {data[error.start]:#04x}", shard.url, error.start, shard.name) from error
