"""Units: the smallest pieces of a source that are read at once, and what a reader of a format must offer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from stoker.data.remote import Loss, Report
from stoker.data.remote.damage import Damaged
from stoker.data.remote.shards import Shard
from stoker.data.remote.store import Store

log = logging.getLogger(__name__)

Content = str | np.ndarray  # a document: its text, or its token ids (any integer dtype, one dimension)


class Splits(Protocol):
    """A source as pieces that can be read in any order. Plain values: it can be forked."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What decides which documents there are and in which split each lies, as JSON values by name."""
        ...

    def __len__(self) -> int: ...

    def read(self, split: int, store: Store, report: Report) -> Iterator[tuple[int, Content]]:
        """(number, document) of the documents of `split`, numbered from 0 in the order they lie.

        What damage makes unreadable is reported, by numbers of the same count, and left out.
        """
        ...


class ByteBlocks:
    """Blocks of `block` bytes of shards laid side by side: a shard of n bytes has ceil(n / block), at least one.

    With `block` None every shard is one block. Which blocks there are follows from the sizes alone.
    """

    def __init__(self, shards: Sequence[Shard], block: int | None) -> None:
        self.shards, self.block = shards, block
        counts = [1 if block is None else max(1, -(-shard.size // block)) for shard in shards]
        self._firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def locate(self, split: int) -> tuple[Shard, int, int]:
        """The shard of a block, and the block's first byte and the one after its last."""
        number = int(np.searchsorted(self._firsts, split, side="right")) - 1
        shard = self.shards[number]
        if self.block is None:
            return shard, 0, shard.size
        begin = (split - int(self._firsts[number])) * self.block
        return shard, begin, min(begin + self.block, shard.size)


class Losses:
    """Keeps the losses of a split, or, with `on_damage=error`, raises the first."""

    def __init__(self, skipping: bool, known: Sequence[tuple[int, int | None]] = ()) -> None:
        """`known`: (first, count) of losses that a state recorded: these are no news, and stay lost."""
        self._skipping, self._known = skipping, known
        self.new: list[Loss] = []

    def __call__(self, loss: Loss) -> None:
        if (loss.first, loss.count) in self._known:
            return
        if not self._skipping:
            raise loss.damage
        log.warning("left out, as data.on_damage=skip says: %s", loss.damage)
        self.new.append(loss)

    @property
    def all_lost(self) -> bool:
        """Whether nothing of the split was readable when it was read first."""
        return (0, None) in self._known

    def lost(self, number: int) -> bool:
        """Whether a document was lost when the split was read first, even if it can be read now."""
        return any(first <= number and (count is None or number < first + count) for first, count in self._known)


def whole(read: Callable[[], Iterator[tuple[int, Content]]], report: Report) -> Iterator[tuple[int, Content]]:
    """`read()`, with an error that ends it reported as the loss of all documents from there on."""
    following = 0
    try:
        for number, content in read():
            following = number + 1
            yield number, content
    except Damaged as error:
        report(Loss(error, following, None))
