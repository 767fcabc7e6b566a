"""Splits: the smallest pieces of a source that are read at once, and the protocol of a reader of a format."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from stoker.data.remote import Leftover, Loss, Report
from stoker.data.remote.damage import Damaged
from stoker.data.remote.shards import Shard
from stoker.data.remote.store import Store

log = logging.getLogger(__name__)

Content = str | np.ndarray  # a document: its text, or its token ids (any integer dtype, one dimension)


class Splits(Protocol):
    """A source as pieces that can be read in any order. Plain values: it can be forked."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """Everything that decides the documents and the split of each, as JSON values by name."""
        ...

    def __len__(self) -> int: ...

    def read(self, split: int, store: Store, report: Report) -> Iterator[tuple[int, Content]]:
        """(number, document) of the documents of `split`, numbered from 0 in their order.

        Damaged documents are reported, with numbers of the same count, and left out. Parts between documents that
        are none are reported as a Leftover.
        """
        ...


class ByteBlocks:
    """Blocks of `block` bytes of consecutive shards: a shard of n bytes has ceil(n / block), at least one.

    A shard that is `whole`, and with `block` None every shard, is one block. The blocks follow from the sizes alone.
    """

    def __init__(self, shards: Sequence[Shard], block: int | None, whole: Sequence[bool] = ()) -> None:
        self.shards = shards
        self.block = None if len(whole) and all(whole) else block  # bytes
        self._uncut = tuple(whole) or (self.block is None,) * len(shards)
        counts = [
            1 if whole or self.block is None else max(1, -(-shard.size // self.block))
            for shard, whole in zip(shards, self._uncut, strict=True)
        ]
        self._firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def locate(self, split: int) -> tuple[Shard, int, int]:
        """The shard of a block, and the block's first byte and the one after its last."""
        number = int(np.searchsorted(self._firsts, split, side="right")) - 1
        shard = self.shards[number]
        if self.block is None or self._uncut[number]:
            return shard, 0, shard.size
        begin = (split - int(self._firsts[number])) * self.block
        return shard, begin, min(begin + self.block, shard.size)


class Losses:
    """Keeps the losses of a split, or, with `on_damage=error`, raises the first."""

    def __init__(self, skipping: bool, known: Sequence[tuple[int, int | None]] = ()) -> None:
        """`known`: (first, count) of losses that a state recorded: these are not reported again, and stay lost."""
        self._skipping, self._known = skipping, known
        self.new: list[Loss] = []
        self.leftovers = 0
        self.first_leftover: Leftover | None = None

    def __call__(self, loss: Loss | Leftover) -> None:
        if isinstance(loss, Leftover):
            self.leftovers += 1
            self.first_leftover = self.first_leftover or loss
            return
        if (loss.first, loss.count) in self._known:
            return
        if not self._skipping:
            raise loss.damage
        log.warning("left out because of data.on_damage=skip: %s", loss.damage)
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
