"""Text files: a split is a run of consecutive files of about the same total size, a document is a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stoker.data.decompress import Limits, TooLarge, decompressed, whole
from stoker.data.formats import Kind
from stoker.data.keys import SplitsKey, bytes_digest
from stoker.data.remote import Damaged, Loss, Report
from stoker.data.remote.shards import Shard
from stoker.data.remote.store import Store
from stoker.data.streaming.splits import Content


@dataclass(frozen=True)
class Files:
    """Splits over whole files, each one document of UTF-8 text."""

    shards: Sequence[Shard]
    names: Sequence[str]  # of each file, below the folder
    kinds: Sequence[Kind]
    firsts: np.ndarray  # int64 [splits + 1]: the first file of each split, and how many files there are
    content: str | None
    limits: Limits

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        lines = "\n".join(f"{name} {shard.size}" for name, shard in zip(self.names, self.shards, strict=True))
        shards = bytes_digest([lines.encode(), self.firsts.tobytes()])
        return SplitsKey("text", shards, self.content, ()).values()

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def read(self, split: int, store: Store, report: Report) -> Iterator[tuple[int, Content]]:
        for number, place in enumerate(range(self.firsts[split], self.firsts[split + 1])):
            shard = self.shards[place]
            try:
                yield number, self._text(shard, self.kinds[place], store)
            except Damaged as error:
                report(Loss(error, number, 1))

    def _text(self, shard: Shard, kind: Kind, store: Store) -> str:
        data = store.read(shard, 0, shard.size)
        try:
            return whole(decompressed([data], kind.compression, self.limits), self.limits).decode()
        except UnicodeDecodeError as error:
            byte = f"not UTF-8: byte {error.object[error.start]:#04x}"
            raise Damaged(byte, shard.url, error.start, shard.name) from error
        except TooLarge as error:
            raise TooLarge(f"cannot read {shard.url}: {error}") from error
        except (OSError, EOFError) as error:
            raise Damaged(str(error), shard.url, None, shard.name) from error


def group(sizes: Sequence[int], split_bytes: int) -> np.ndarray:
    """The first file of each split: a split ends where it has reached `split_bytes`. int64 `[splits + 1]`."""
    firsts, held = [0], 0
    for place, size in enumerate(sizes):
        if held and held + size > split_bytes:
            firsts.append(place)
            held = 0
        held += size
    return np.array([*firsts, len(sizes)], np.int64)
