"""Files in the format of tiktoken."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path


def tiktoken_file(path: Path, count: int, *tokens: bytes) -> Path:
    """`count` tokens: all bytes, `tokens`, and made-up words."""
    words = dict.fromkeys([*(bytes([number]) for number in range(256)), *tokens])
    letters = "qwrtzpsdfghjklyxcvbnm"
    for word in itertools.product(letters, repeat=4):
        if len(words) == count:
            break
        words.setdefault("".join(word).encode())
    for number in range(count - len(words)):
        words[f" {number}".encode()] = None
    lines = (f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate(words))
    path.write_text("\n".join(lines) + "\n")
    return path
