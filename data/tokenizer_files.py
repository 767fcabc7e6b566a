"""Tokenizers that somebody made: found at a path, loaded, and kept beside what was made with them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stoker.data.tokenizer import END_OF_DOCUMENT, ByteTokenizer, JsonTokenizer, Tokenizer

# Closing tokens of well-known tokenizers, asked for where a bare tokenizer.json names none.
_USUAL_ENDS = (END_OF_DOCUMENT, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"""
    r"""\s+(?!\S)|\s"""
)
# How a .tiktoken file's texts are cut before they are encoded is not in the file; its number of tokens tells.
_PATTERNS = {50256: ("gpt2", _GPT2, 50256), 100256: ("cl100k", _CL100K, 100257)}
_TIKTOKEN_END = "<|endoftext|>"


class TiktokenTokenizer:
    """A .tiktoken file: base64 tokens and their ranks, one a line. Needs the `tiktoken` package."""

    def __init__(self, content: bytes, end_of_document: str = _TIKTOKEN_END, pattern: str | None = None) -> None:
        """`pattern`: the regular expression that cuts texts first; default: GPT-2's, or cl100k's for its vocabulary."""
        try:
            import tiktoken
        except ImportError as error:
            raise ValueError("a .tiktoken file needs the package tiktoken: pip install 'stoker[tiktoken]'") from error
        try:
            lines = [line.split() for line in content.splitlines() if line.strip()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError as error:
            raise ValueError(f"this is no .tiktoken file: {error}") from error
        name, usual, end = _PATTERNS.get(len(ranks), ("gpt2", _GPT2, max(ranks.values(), default=-1) + 1))
        self.content, self.end_token, self.pattern = content, end_of_document, pattern or usual
        self._encoding = tiktoken.Encoding(
            name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={end_of_document: end}
        )
        self.end_of_document = end
        self.vocab_size = end + 1
        known = hashlib.sha256(content + self.pattern.encode()).hexdigest()[:16]
        self.fingerprint = f"tiktoken {known} {end_of_document}"

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, np.uint32) for ids in self._encoding.encode_ordinary_batch(texts)]

    def encode_template(self, text: str) -> tuple[list[int], list[int]]:
        ids = self._encoding.encode(text, allowed_special="all")
        ends = np.cumsum([len(self._encoding.decode_single_token_bytes(number)) for number in ids]).tolist()
        places = np.cumsum([len(letter.encode()) for letter in text])
        return ids, (np.searchsorted(places, ends, side="left") + 1).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([number for number in ids if number < self.end_of_document])

    def files(self) -> Mapping[str, bytes]:
        facts = {"kind": "tiktoken", "end_of_document": self.end_token, "pattern": self.pattern}
        return {"tokens.tiktoken": self.content, "stoker.json": json.dumps(facts).encode()}


def load_tokenizer(path: Path, end_of_document: str | None = None) -> Tokenizer:
    """The tokenizer at `path`: a tokenizer.json, a folder with one (as transformers keeps it), or a .tiktoken file.

    `end_of_document`: the token that closes a document; default: what the folder calls the end (`eos_token`), or the
    usual names. Raises ValueError, naming the path, for anything else.
    """
    try:
        if path.is_dir():
            if (path / "stoker.json").exists():
                return load_kept(path)
            return _load_folder(path, end_of_document)
        if path.suffix == ".tiktoken":
            return TiktokenTokenizer(path.read_bytes(), end_of_document or _TIKTOKEN_END)
        return _from_json(path.read_text(encoding="utf-8"), end_of_document)
    except FileNotFoundError:
        raise ValueError(f"data.tokenizer={path}: it is not there; say byte, bpe or the path of a tokenizer") from None
    except OSError as error:
        raise ValueError(f"cannot read data.tokenizer={path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"data.tokenizer={path}: {error}") from error


def load_kept(folder: Path) -> Tokenizer:
    """The tokenizer whose `files()` lie in `folder`. Raises OSError or ValueError when they do not."""
    facts = json.loads((folder / "stoker.json").read_text())
    if facts["kind"] == "byte":
        return ByteTokenizer()
    if facts["kind"] == "tiktoken":
        content = (folder / "tokens.tiktoken").read_bytes()
        return TiktokenTokenizer(content, facts["end_of_document"], facts["pattern"])
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return JsonTokenizer(text, facts["end_of_document"], facts["vocab_size"])


def _load_folder(folder: Path, end_of_document: str | None) -> Tokenizer:
    tokenizer_json = folder / "tokenizer.json"
    end = end_of_document or _named_end(folder)
    if tokenizer_json.exists():
        return _from_json(tokenizer_json.read_text(encoding="utf-8"), end)
    if not (folder / "tokenizer_config.json").exists():
        raise ValueError("the folder has no tokenizer.json")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError("only transformers can read this folder: pip install 'stoker[hf]'") from error
    backend = getattr(AutoTokenizer.from_pretrained(folder, local_files_only=True), "backend_tokenizer", None)
    if backend is None:
        raise ValueError("transformers has no fast tokenizer for it")
    return _from_json(backend.to_str(), end)


def _from_json(text: str, end: str | None) -> JsonTokenizer:
    if end is None:
        added = {entry.get("content") for entry in _parsed(text).get("added_tokens") or []}
        end = next((name for name in _USUAL_ENDS if name in added), _USUAL_ENDS[0])
    return JsonTokenizer(text, end)


def _named_end(folder: Path) -> str | None:
    """What a folder of transformers calls the end of a text."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            end = _parsed((folder / name).read_text(encoding="utf-8")).get("eos_token")
            if end:
                return end["content"] if isinstance(end, dict) else end
    return None


def _parsed(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    return values
