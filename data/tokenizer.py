"""Tokenizers: bytes, a byte-level BPE trained on the data, or an existing one.

    byte               UTF-8 bytes
    bpe                trained on the training documents at first use
    PATH               a folder as transformers keeps it (hub_tokenizer.py), a tokenizer.json, a SentencePiece .model
                       or a .tiktoken file (tiktoken_files.py); tokenizer_files.py finds which

Every tokenizer but `byte` can be written to a folder, and loaded from it without the original: a run and a token
cache keep theirs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from stoker.conf.records import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_DOCUMENT = "<|end_of_document|>"

Span = tuple[int, int]  # of a text: its first character, and the one after its last


class Tokenizer(Protocol):
    """Text to token ids in `range(vocab_size)` and back."""

    vocab_size: int  # ids that a model needs, some of them perhaps reserved
    end_of_document: int  # the id that closes each document; no text encodes to it
    fingerprint: str  # differs between two tokenizers that encode differently

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text encodes to, only a template; `end_of_document` is among them."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, of any unsigned integer dtype, on as many cores as help."""
        ...

    def encode_template(self, text: str) -> tuple[list[int], list[Span]]:
        """The ids of a text with its special tokens recognised, and the characters of each id."""
        ...

    @property
    def renderer(self) -> Renderer:
        """The renderer of chat templates for this tokenizer."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special and reserved ids give no text, broken UTF-8 gives U+FFFD."""
        ...

    def files(self) -> Mapping[str, bytes]:
        """The files to load it again (`stoker.data.tokenizer_files.load_kept`): contents by file name."""
        ...


class Renderer:
    """A tokenizer of transformers that renders chat templates.

    `names` are variables of the template that the tokenizer does not provide, such as `eos_token`.
    `same_ids`: whether its ids are those of the original tokenizer; otherwise they are UTF-8 bytes.
    """

    def __init__(self, backend: PreTrainedTokenizerBase, names: Mapping[str, str], same_ids: bool) -> None:
        self.backend, self.names, self.same_ids = backend, dict(names), same_ids

    @property
    def fingerprint(self) -> str:
        """Changes with all that ids and their places in a text depend on, and with the template's variables."""
        values = json.loads(self.backend.backend_tokenizer.to_str())
        encoding = {key: value for key, value in values.items() if key not in ("truncation", "padding")}
        names = {**self.backend.special_tokens_map, **self.names}
        facts = [encoding, names, self.backend.split_special_tokens]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def of_bytes(cls, names: Mapping[str, str]) -> Renderer:
        """For a tokenizer that transformers has no class for."""
        from transformers import PreTrainedTokenizerFast

        return cls(PreTrainedTokenizerFast(tokenizer_object=byte_encoder()), names, same_ids=False)


class ByteTokenizer:
    """UTF-8 bytes: ids 0-255, 256 ends a document, the rest up to a multiple of 64 is reserved.

    A multiple divides over tensor-parallel ranks and fills tensor cores.
    """

    vocab_size = 320
    end_of_document = 256
    special_ids = frozenset({256})
    fingerprint = "byte"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def encode_template(self, text: str) -> tuple[list[int], list[Span]]:
        ids = self.encode(text)
        return ids, spans_of_bytes(text, np.arange(len(ids) + 1))

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer.of_bytes({"bos_token": "", "eos_token": ""})

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(number for number in ids if number < 256).decode(errors="replace")

    def files(self) -> Mapping[str, bytes]:
        return {"stoker.json": b'{"kind": "byte"}'}


class JsonTokenizer:
    """Any tokenizer in the format of the `tokenizers` library (its tokenizer.json)."""

    def __init__(self, source: str, end_of_document: str = END_OF_DOCUMENT, vocab_size: int | None = None) -> None:
        """`vocab_size` may exceed the ids in `source` (default: their number): few texts give few merges.

        Raises ValueError for any other file, and for an end of document that it does not have.
        """
        from tokenizers import Tokenizer as Encoder

        try:
            self._encoder, self._specials = Encoder.from_str(source), Encoder.from_str(source)
        except Exception as error:  # the library raises no specific error
            raise ValueError(f"this is no tokenizer.json: {error}") from error
        self._encoder.encode_special_tokens = True  # a text that contains a special token's name gets no special id
        for encoder in (self._encoder, self._specials):
            encoder.no_truncation()
            encoder.no_padding()
        self.json, self.end_token = source, end_of_document
        held = max(self._encoder.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocab_size = held if vocab_size is None else max(vocab_size, held)
        end = self._encoder.token_to_id(end_of_document)
        if end is None:
            raise ValueError(f"the tokenizer has no token {end_of_document}: data.end_of_document=TOKEN names one")
        self.end_of_document = end
        added = self._encoder.get_added_tokens_decoder().items()
        model = parse_json(source)["model"]
        unknown = (
            model.get("unk_id") if model.get("unk_token") is None else self._encoder.token_to_id(model["unk_token"])
        )
        self.special_ids = frozenset(number for number, token in added if token.special) - {unknown} | {end}
        content = hashlib.sha256(source.encode()).hexdigest()[:16]
        self.fingerprint = f"json {self.vocab_size} {content} {end_of_document}"

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
        """A byte-level BPE with the merges of `texts`; the same texts give the same tokenizer."""
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
        return cls(encoder.to_str(), END_OF_DOCUMENT, vocab_size)

    def encode(self, text: str) -> list[int]:
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        _let_threads_run()
        found = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in found]

    def encode_template(self, text: str) -> tuple[list[int], list[Span]]:
        found = self._specials.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    @cached_property
    def renderer(self) -> Renderer:
        from transformers import PreTrainedTokenizerFast

        names = {"bos_token": "", "eos_token": self.end_token}
        return Renderer(PreTrainedTokenizerFast(tokenizer_object=self._specials), names, same_ids=True)

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoder.decode(list(ids))

    def files(self) -> Mapping[str, bytes]:
        facts: dict[str, Any] = {"kind": "json", "end_of_document": self.end_token, "vocab_size": self.vocab_size}
        return {"tokenizer.json": self.json.encode(), "stoker.json": json.dumps(facts).encode()}


def byte_encoder() -> Any:
    """UTF-8 bytes as a tokenizer of the `tokenizers` library: a byte-level BPE without merges."""
    from tokenizers import Tokenizer as Encoder
    from tokenizers import decoders, models, pre_tokenizers

    # Byte-level BPE (Radford et al. 2019) writes bytes as letters: those that can be seen as themselves, the others,
    # in order, as the letters from 256 on.
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    vocabulary = {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(unseen)}
    encoder = Encoder(models.BPE(vocab=vocabulary, merges=[]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.decoder = decoders.ByteLevel()
    return encoder


def spans_of_bytes(text: str, bounds: np.ndarray) -> list[Span]:
    """The characters of `text` that lie, if only in part, between one of its bytes' `bounds` and the next."""
    ends = np.cumsum([len(letter.encode()) for letter in text])  # bytes up to the end of each character
    begins = np.searchsorted(ends, bounds[:-1], side="right")
    return list(zip(begins.tolist(), (np.searchsorted(ends, bounds[1:], side="left") + 1).tolist(), strict=True))


def _let_threads_run() -> None:
    # Without this the library switches its threads off, with a warning, in every process forked after their use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
