"""The contents of shards as one fingerprint of samples of their bytes, independent of place and name.

Of few shards many places are sampled, and small ones are read whole; of thousands of shards the first bytes of each are
read. The result is kept for the version of each shard (an ETag, or a file's stamp), so that not every rank
reads it at every start.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from stoker.data.documents import Document
from stoker.data.keys import bytes_digest, digest
from stoker.data.manifest import Memo
from stoker.data.remote.shards import Shard
from stoker.data.remote.store import Store

_SAMPLE = 16 << 10  # bytes
_SAMPLES, _MOST = 1024, 64  # of all shards together, and of each, at most
_AT_ONCE = 32  # shards


def content_of(shards: Sequence[Shard], store: Store, root: Path) -> str | None:
    """The fingerprint of the contents of `shards`, kept below `root`; None for the output of commands.

    Raises Damaged for a shard that cannot be read.
    """
    if any(shard.size < 0 for shard in shards):
        return None
    memo = Memo(root / "versions", [Document(_name(shard), str, shard.version or None) for shard in shards])
    content = memo.recall()
    if content is None:
        samples = max(1, min(_MOST, _SAMPLES // len(shards)))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            content = digest(list(pool.map(partial(_sampled, store=store, samples=samples), shards)))
        memo.remember(content)
    return content


def _name(shard: Shard) -> str:
    return f"samples of {shard.url} {shard.size}"


def _sampled(shard: Shard, store: Store, samples: int) -> list[int | str]:
    if shard.size <= samples * _SAMPLE:
        return [shard.size, bytes_digest([store.read(shard, 0, shard.size)])]
    places = np.linspace(0, shard.size - _SAMPLE, samples).astype(np.int64).tolist()
    return [shard.size, bytes_digest([store.read(shard, at, at + _SAMPLE) for at in places])]
