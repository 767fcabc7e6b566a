"""Text of others on a terminal: control sequences are shown, never sent.

Logs, messages, names and generated text may hold sequences that move the cursor, change what was printed before, or
have a terminal answer as if its user had typed. Directional marks, which reorder what is read, are of the same kind.
"""

from __future__ import annotations

import re

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with control characters, but line ends and tabs, as Python writes them: `\\x1b`, `\\u202e`."""
    return _CONTROLS.sub(_escaped, text.replace("\r\n", "\n"))


def _escaped(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
