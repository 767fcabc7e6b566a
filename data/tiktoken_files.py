"""`.tiktoken` files: base64 tokens and their ranks, one a line.

The pattern that splits texts before encoding and the special tokens are not in the file: the number of its
tokens identifies the published files. Any other needs `data.tiktoken_pattern` and `data.end_of_document`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stoker.data.tokenizer import Renderer, Span, spans_of_bytes

_LETTERS = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"""
    r"""\s+(?!\S)|\s"""
)
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_LETTERS}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_LETTERS}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Known:
    """A published file: its split pattern, its special tokens, and the one that ends a text."""

    name: str
    pattern: str
    specials: Mapping[str, int]
    end: str
    begin: str = ""


def _llama3() -> dict[str, int]:
    named = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    unnamed = iter(range(256))
    return {named.get(n) or f"<|reserved_special_token_{next(unnamed)}|>": 128000 + n for n in range(256)}


def _qwen() -> dict[str, int]:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))]
    return {name: 151643 + number for number, name in enumerate(names)}


_KNOWN = {
    50256: _Known("gpt2", _GPT2, {"<|endoftext|>": 50256}, "<|endoftext|>"),
    100256: _Known("cl100k", _CL100K, {"<|endoftext|>": 100257}, "<|endoftext|>"),
    199998: _Known("o200k", _O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}, "<|endoftext|>"),
    128000: _Known("llama3", _LLAMA3, _llama3(), "<|end_of_text|>", "<|begin_of_text|>"),
    151643: _Known("qwen", _QWEN, _qwen(), "<|endoftext|>"),
}


class TiktokenTokenizer:
    """See `stoker.data.tokenizer.Tokenizer`. Needs the `tiktoken` package, which reads and encodes."""

    def __init__(
        self,
        content: bytes,
        end_of_document: str | None = None,
        pattern: str | None = None,
        specials: Mapping[str, int] | None = None,
    ) -> None:
        """`pattern`: the regular expression that splits texts first; `specials`: ids of special tokens by name.

        Default of each: that of the published file with this number of tokens. A file that is none of them needs
        `pattern` and `end_of_document`, which becomes the id after the last. Raises ValueError for any other
        file, and for an end that is not among the special tokens.
        """
        try:
            import tiktoken
        except ImportError as error:
            raise ValueError("a .tiktoken file needs the package tiktoken: pip install 'stoker[tiktoken]'") from error
        ranks = _ranks(content)
        known = _KNOWN.get(len(ranks))
        if specials is None:
            specials = _specials(len(ranks), known, pattern, end_of_document, max(ranks.values()))
        end = end_of_document or (known.end if known else "")
        if end not in specials:
            few = ", ".join(list(specials)[:12])
            raise ValueError(f"data.end_of_document={end} is none of its special tokens, such as {few}")
        self.pattern = pattern or (known.pattern if known else "")
        name = known.name if known else "given"
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=dict(specials)
            )
        except ValueError as error:
            raise ValueError(f"data.tiktoken_pattern={self.pattern}: {error}") from error
        self.content, self.end_token, self.specials = content, end, dict(specials)
        self.end_of_document = self.specials[end]
        self.special_ids, self._ordinary = frozenset(self.specials.values()), frozenset(ranks.values())
        self.vocab_size = max(*ranks.values(), *self.specials.values()) + 1
        self._begin = known.begin if known else ""
        # Runs stored before several special tokens were supported hold the fingerprint of a single one.
        several = json.dumps(self.specials, sort_keys=True).encode() if len(self.specials) > 1 else b""
        digest = hashlib.sha256(content + self.pattern.encode() + several).hexdigest()[:16]
        self.fingerprint = f"tiktoken {digest} {end}"

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, np.uint32) for ids in self._encoding.encode_ordinary_batch(texts)]

    def encode_template(self, text: str) -> tuple[list[int], list[Span]]:
        ids = self._encoding.encode(text, allowed_special="all")
        lengths = [len(self._encoding.decode_single_token_bytes(number)) for number in ids]
        return ids, spans_of_bytes(text, np.cumsum([0, *lengths]))

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer.of_bytes({"bos_token": self._begin, "eos_token": self.end_token})

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([number for number in ids if number in self._ordinary])

    def files(self) -> Mapping[str, bytes]:
        facts: dict[str, Any] = {"kind": "tiktoken", "end_of_document": self.end_token, "pattern": self.pattern}
        return {
            "tokens.tiktoken": self.content,
            "stoker.json": json.dumps(facts | {"specials": self.specials}).encode(),
        }


def _ranks(content: bytes) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in content.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise ValueError(f"this is no .tiktoken file: {error}") from error
    if len(ranks) != len(lines) or len(set(ranks.values())) != len(lines):
        raise ValueError("this is no sound .tiktoken file: a token or a rank occurs in it twice")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"this is no sound .tiktoken file: it has no token for the byte {missing[0]:#04x}")
    return ranks


def _specials(count: int, known: _Known | None, pattern: str | None, end: str | None, last: int) -> Mapping[str, int]:
    if known is not None and (end is None or pattern is None or end in known.specials):
        return known.specials
    if pattern is None or end is None:
        sizes = ", ".join(f"{size} ({entry.name})" for size, entry in _KNOWN.items())
        raise ValueError(
            f"it holds {count} tokens, which is none of the published files ({sizes}): its split pattern and end token "
            "are not in it. Set them by data.tiktoken_pattern=REGEX and data.end_of_document=TOKEN"
        )
    return {end: last + 1}
