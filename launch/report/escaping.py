"""Text of a run directory in a page or a table: it may be another user's, so it never becomes markup."""

from __future__ import annotations

import html
import re
from typing import Any

from stoker.conf.printable import printable
from stoker.conf.secrets import mask

MOST_CHARACTERS = 400  # of one text
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|<>~&-])")


def text(value: Any) -> str:
    """`value` for HTML, between tags or in a quoted attribute."""
    return html.escape(_plain(value))


def markdown(value: Any) -> str:
    """`value` for a cell of a table in Markdown."""
    return _MARKDOWN.sub(r"\\\1", _plain(value).replace("\n", " "))


def _plain(value: Any) -> str:
    shown = mask(printable(str(value)))
    return shown if len(shown) <= MOST_CHARACTERS else f"{shown[:MOST_CHARACTERS]}..."
