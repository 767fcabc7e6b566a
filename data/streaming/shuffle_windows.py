"""Windows: a few splits read together, their documents shuffled and tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from stoker.data.keys import WindowsKey, is_validation, text_digest
from stoker.data.remote import Damaged, Loss
from stoker.data.remote.store import Store
from stoker.data.shuffle import permute
from stoker.data.splitting import POSITION
from stoker.data.streaming.assignment import ALL, Skip
from stoker.data.streaming.splits import Content, Losses, Splits, whole
from stoker.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Window:
    """The documents of a window laid end to end, each closed by end_of_document."""

    ids: np.ndarray  # uint16 or uint32 [tokens]
    starts: np.ndarray  # int64 [documents], the number of each document's first token
    skips: tuple[Skip, ...]
    bytes: int  # read from files and servers
    retries: int
    leftovers: int = 0  # parts between the documents that are none


@dataclass(frozen=True)
class ShuffleWindows:
    """The windows of a source, numbered consecutively through the epochs: each epoch has a separate order of splits."""

    name: str
    splits: Splits
    splits_per_window: int
    seed: int
    tokenizer: Tokenizer
    validation: float  # share of the documents that are kept for validation
    skipping: bool  # data.on_damage=skip
    epochs: int | None
    held_out: bool = False  # the documents kept for validation, and no others
    by_position: bool = False  # of the one document, its end is kept for validation

    @property
    def per_epoch(self) -> int:
        return -(-len(self.splits) // self.splits_per_window)

    @property
    def total(self) -> int | None:
        """How many windows there are; None: without end."""
        return None if self.epochs is None else self.epochs * self.per_epoch

    @property
    def key(self) -> WindowsKey:
        """All that the windows depend on."""
        return WindowsKey(
            source=self.splits.fingerprint,
            splits=len(self.splits),
            shuffle_window=self.splits_per_window,
            seed=self.seed,
            tokenizer=self.tokenizer.fingerprint,
            validation=self.validation,
            validation_by=POSITION if self.by_position else None,
        )

    def splits_of(self, window: int) -> list[int]:
        """The splits of a window."""
        epoch, place = divmod(window, self.per_epoch)
        begin = place * self.splits_per_window
        places = np.arange(begin, min(begin + self.splits_per_window, len(self.splits)))
        return permute(places, len(self.splits), self.seed, epoch, of="units").tolist()

    def read(self, window: int, store: Store, known: Sequence[Skip] | None = None) -> Window:
        """Read and tokenise `window`.

        `known` are the skips that a state recorded for it: the same documents are left out again, and no others. Raises
        Damaged for damage that may not be skipped.
        """
        before = (store.traffic.bytes, store.traffic.retries)
        contents: list[Content] = []
        skips: list[Skip] = []
        leftovers = 0
        for split in self.splits_of(window):
            losses = Losses(
                self.skipping and known is None,
                [(s.first, None if s.documents == ALL else s.documents) for s in known or () if s.split == split],
            )
            if losses.all_lost:
                continue
            documents = whole(partial(self.splits.read, split, store, losses), losses)
            for number, content in documents:
                if losses.lost(number):
                    continue
                if not len(content):
                    leftovers += 1
                    continue
                if wrong := self._wrong_ids(content):
                    where = f"{self.name}, split {split}"
                    losses(Loss(Damaged(wrong, where, None, f"document {number}"), number, 1))
                elif self.by_position:
                    cut = len(content) - int(len(content) * self.validation)
                    contents.append(content[cut:] if self.held_out else content[:cut])
                elif is_held_out(content, self.validation) == self.held_out:
                    contents.append(content)
            leftovers += losses.leftovers
            skips += [Skip(window, split, loss.first, ALL if loss.count is None else loss.count) for loss in losses.new]
        order = permute(np.arange(len(contents)), max(1, len(contents)), self.seed, window, of="documents")
        ids, starts = self._tokenise([contents[place] for place in order.tolist()])
        traffic = store.traffic
        read, retried = traffic.bytes - before[0], traffic.retries - before[1]
        return Window(ids, starts, tuple(skips), read, retried, leftovers)

    def _wrong_ids(self, content: Content) -> str | None:
        if isinstance(content, str) or (content.min() >= 0 and content.max() < self.tokenizer.vocab_size):
            return None
        return f"token ids {content.min()} to {content.max()}, and the tokenizer has {self.tokenizer.vocab_size}"

    def _tokenise(self, contents: Sequence[Content]) -> tuple[np.ndarray, np.ndarray]:
        dtype = np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32
        encoded = iter(self.tokenizer.encode_batch([content for content in contents if isinstance(content, str)]))
        found = [next(encoded) if isinstance(content, str) else content for content in contents]
        lengths = np.array([len(ids) + 1 for ids in found], np.int64)
        ends = np.cumsum(lengths)
        ids = np.empty(int(ends[-1]) if len(ends) else 0, dtype)
        for end, tokens in zip(ends.tolist(), found, strict=True):
            ids[end - 1 - len(tokens) : end - 1] = tokens
        ids[ends - 1] = self.tokenizer.end_of_document
        return ids, ends - lengths


def is_held_out(content: Content, share: float) -> bool:
    """Whether a document is kept for validation, as a share of all is. Equal documents go to the same side."""
    if not share:
        return False
    return is_validation(
        text_digest(content.encode() if isinstance(content, str) else content.astype("<u4").tobytes()), share
    )
