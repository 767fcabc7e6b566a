"""Tokenizers: bytes as they are, or a byte-level BPE trained on the data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Protocol

import numpy as np

END_OF_DOCUMENT = "<|end_of_document|>"


class Tokenizer(Protocol):
    """Text to token ids in `range(vocab_size)` and back."""

    vocab_size: int  # ids that a model needs, some of them perhaps reserved
    end_of_document: int  # the id that closes each document; no text encodes to it
    fingerprint: str  # two tokenizers that encode differently differ here

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, of any unsigned integer dtype, on as many cores as help."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special and reserved ids give nothing, broken UTF-8 gives U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes: ids 0-255, 256 ends a document, the rest up to a multiple of 64 is reserved.

    The multiple lets the vocabulary divide over tensor-parallel ranks and fills tensor cores.
    """

    vocab_size = 320
    end_of_document = 256
    fingerprint = "byte"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(number for number in ids if number < 256).decode(errors="replace")


class BpeTokenizer:
    """Byte-level BPE in the format of the `tokenizers` library (its tokenizer.json)."""

    def __init__(self, json: str, vocab_size: int) -> None:
        """`vocab_size` may exceed the ids in `json`: few texts have few merges to learn."""
        from tokenizers import Tokenizer as Encoder

        self._encoder = Encoder.from_str(json)
        self._encoder.encode_special_tokens = True  # a text that spells the special token gets no special id
        self.json = json
        self.vocab_size = vocab_size
        end = self._encoder.token_to_id(END_OF_DOCUMENT)
        if end is None:
            raise ValueError(f"this tokenizer has no token {END_OF_DOCUMENT}")
        self.end_of_document = end
        self.fingerprint = f"bpe {vocab_size} {hashlib.sha256(json.encode()).hexdigest()[:16]}"

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Learn the merges of `texts`; the same texts give the same tokenizer."""
        from tokenizers import Tokenizer as Encoder
        from tokenizers import decoders, models, pre_tokenizers, trainers

        _let_threads_run()
        encoder = Encoder(models.BPE())
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        encoder.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        encoder.train_from_iterator(texts, trainer)
        return cls(encoder.to_str(), vocab_size)

    def encode(self, text: str) -> list[int]:
        return self._encoder.encode(text).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        _let_threads_run()
        return [np.array(found.ids, np.uint32) for found in self._encoder.encode_batch_fast(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoder.decode(list(ids))


def _let_threads_run() -> None:
    # Unless told, the library switches its threads off, with a warning, in every process forked after their use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
