"""Which tokens of each sequence a rank takes: arithmetic on the host, equal on all ranks.

A query sees the keys before it in its document, so the work of a block of queries follows from the lengths of the
documents. Blocks are assigned greedily, those of most work first, each to the rank of least work that has room (Graham
1969, longest processing time first). Every rank gets as many tokens of each sequence.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stoker.parallel.batch import Batch
from stoker.parallel.sequence.axis import ULYSSES, SequenceAxis

BLOCK = 128  # tokens at most, as many as attention kernels take at a time
PER_RANK = 8  # blocks at least, where the sequence is long enough


def own_tokens(rows: Batch, axis: SequenceAxis, document_mask: bool) -> Batch:
    """This rank's tokens of whole `rows`, `[rows, seq_len / cp]`, in the order of the sequence.

    `document_mask`: attention stays inside documents. Raises ValueError where tokens do not divide over the ranks.
    """
    length = rows.tokens.shape[1]
    if length % axis.size:
        raise ValueError(f"sequences of {length} tokens do not divide over {axis.size} context-parallel ranks")
    share = length // axis.size
    if axis.exchange == ULYSSES or not len(rows):
        return rows.map(lambda field: field[:, axis.rank * share : (axis.rank + 1) * share].contiguous())
    documents = rows.documents.cpu().numpy() if document_mask else np.zeros(tuple(rows.documents.shape), np.int32)
    mine = torch.from_numpy(np.stack([order(row, axis.size)[axis.rank] for row in documents]))

    def taken(field: Tensor) -> Tensor:
        places = mine.view(*mine.shape, *[1] * (field.dim() - 2)).expand(*mine.shape, *field.shape[2:])
        found = torch.empty(places.shape, dtype=field.dtype, device=field.device, pin_memory=field.is_pinned())
        return torch.gather(field, 1, places.to(field.device), out=found)

    return rows.map(taken)


def order(documents: np.ndarray, ranks: int) -> np.ndarray:
    """The tokens of each rank, int64 `[ranks, seq_len / ranks]`, rising: places in a sequence of `documents`.

    `documents` is int `[seq_len]`, equal for the tokens of a document, which lie together; `ranks` divides seq_len.
    """
    length = len(documents)
    share = length // ranks
    size = block_size(share)
    work = keys_of(documents).reshape(-1, size).sum(1)
    room, load = np.full(ranks, share // size), np.zeros(ranks, np.int64)
    owner = np.empty(len(work), np.int64)
    for block in np.argsort(-work, kind="stable"):
        rank = int(np.argmin(np.where(room > 0, load, np.iinfo(np.int64).max)))
        owner[block] = rank
        load[rank] += work[block]
        room[rank] -= 1
    blocks = np.argsort(owner, kind="stable").reshape(ranks, -1, 1)
    return (blocks * size + np.arange(size)).reshape(ranks, share)


def keys_of(documents: np.ndarray) -> np.ndarray:
    """How many keys each query sees, itself included, in a sequence of `documents`: int64 `[seq_len]`."""
    place = np.arange(len(documents))
    begins = np.where(np.diff(documents, prepend=documents[:1] - 1) != 0, place, 0)
    return place - np.maximum.accumulate(begins) + 1


def block_size(share: int) -> int:
    """Tokens of a block where a rank has `share` tokens of a sequence: a divisor of it."""
    most = min(BLOCK, max(1, share // PER_RANK))
    return next(size for size in range(most, 0, -1) if share % size == 0)
