"""A tokenizer folder of transformers: the AutoTokenizer's result, and the files that it was made from.

Texts are encoded by a copy of its backend (the `tokenizers` library) on all cores, chats by the tokenizer.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stoker.conf.records import parse_json
from stoker.conf.scratch import Scratch
from stoker.data.tokenizer import JsonTokenizer, Renderer, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# In addition to the files that a class of transformers names (`vocab_files_names`).
_COMMON_FILES = (
    "config.json",  # its model_type may decide the class
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "tokenizer.*.json",  # of a version of transformers: `fast_tokenizer_files`
    "tokenizer.model*",
    "tiktoken.model",
    "tekken.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
# Closing tokens of well-known tokenizers, looked for where no file names one.
USUAL_ENDS = ("<|end_of_document|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class HubTokenizer:
    """See `stoker.data.tokenizer.Tokenizer`. `hub` is the tokenizer of transformers."""

    def __init__(self, folder: Path, end_of_document: str | None = None) -> None:
        """`end_of_document`: the token that closes a document; default: the `eos_token`, or one of the usual names.

        No code of the folder is run, and nothing is downloaded. Raises ValueError for a folder that transformers
        cannot read, or only by a class without a backend in the `tokenizers` library.
        """
        self.hub = _load(folder)
        self._files = _files_of(self.hub, folder)
        encoder = self.hub.backend_tokenizer
        try:
            backend = encoder.to_str()
        except Exception as error:  # the library raises no specific error
            raise ValueError(f"{type(self.hub).__name__} of transformers cannot be copied: {error}") from error
        held = encoder.get_vocab(with_added_tokens=True)
        end = end_of_document or self.hub.eos_token or next((name for name in USUAL_ENDS if name in held), None)
        if end is None:
            raise ValueError("the tokenizer names no eos_token: data.end_of_document=TOKEN names one")
        self._plain = JsonTokenizer(_as_in_the_file(backend, self._files), end)
        self.end_token, self.end_of_document = end, self._plain.end_of_document
        self.vocab_size, self.fingerprint = self._plain.vocab_size, self._plain.fingerprint
        self.special_ids = self._plain.special_ids

    @classmethod
    def of_files(cls, files: Mapping[str, bytes], end_of_document: str | None = None) -> HubTokenizer:
        """The tokenizer of a folder with these files. Raises ValueError as the constructor does."""
        with Scratch("stoker-tokenizer-") as folder:
            for name, content in files.items():
                (folder / name).write_bytes(content)
            return cls(folder, end_of_document)

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return self._plain.encode_batch(texts)

    def encode_template(self, text: str) -> tuple[list[int], list[Span]]:
        found = self.hub(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["input_ids"], found["offset_mapping"]

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.hub, {}, same_ids=True)

    def decode(self, ids: Iterable[int]) -> str:
        return self._plain.decode(ids)

    def files(self) -> Mapping[str, bytes]:
        """The folder's own files, and which token ends a document."""
        facts = {"kind": "hub", "end_of_document": self.end_token}
        return {**self._files, "stoker.json": json.dumps(facts).encode()}


def _load(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        hub = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # depends on the folder: its classes raise any error
        first = (str(error).strip() or "without a message").splitlines()[0]
        message = f"transformers cannot read this folder: {type(error).__name__}: {first}"
        if importlib.util.find_spec("sentencepiece") is None and any(folder.glob("*.model")):
            message = "a SentencePiece .model needs the package sentencepiece: pip install 'stoker[sentencepiece]'"
        raise ValueError(message) from error
    if getattr(hub, "backend_tokenizer", None) is None:
        raise ValueError(
            f"transformers reads this folder as {type(hub).__name__}, which has no backend in the tokenizers library: "
            "save it with a tokenizer.json"
        )
    return hub


def _files_of(hub: PreTrainedTokenizerBase, folder: Path) -> dict[str, bytes]:
    """The files of `folder` that make the tokenizer."""
    patterns = {*_COMMON_FILES, *(name for name in hub.vocab_files_names.values() if isinstance(name, str))}
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _as_in_the_file(backend: str, files: Mapping[str, bytes]) -> str:
    """The folder's tokenizer.json where it encodes as `backend` does, and `backend` where transformers changed it.

    So the fingerprint of a folder that transformers does not change is independent of the library's version.
    """
    from tokenizers import Tokenizer as Encoder

    if "tokenizer.json" not in files:
        return backend
    source = files["tokenizer.json"].decode("utf-8")
    return source if _encoding(Encoder.from_str(source).to_str()) == _encoding(backend) else backend


def _encoding(source: str) -> dict[str, object]:
    """The parts of a tokenizer.json that decide the ids of a text, and their decoding."""
    return {key: value for key, value in parse_json(source).items() if key not in _NOT_OF_IDS}


_NOT_OF_IDS = ("post_processor", "truncation", "padding")  # they add special tokens, shift offsets, cut or fill
