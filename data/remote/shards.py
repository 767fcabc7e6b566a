"""Shards: their addresses, sizes and versions."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stoker.data.keys import digest

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Shard:
    """One file of a data set. `size` in bytes is -1 where only reading to the end gives it (`pipe:`)."""

    url: str
    size: int
    version: str = ""  # the server's ETag or the file's time stamp: two reads with one version read the same bytes

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.url.split("?")[0].rstrip("/").rpartition("/")[2]


def scheme(url: str) -> str:
    """`file`, `http`, `https`, `s3`, `pipe` or any other scheme before the colon."""
    found, separator, _ = url.partition(":")
    return found if separator and (found == "pipe" or url.startswith(f"{found}://")) else "file"


def local_path(url: str) -> str:
    """The path of a `file` URL or of a plain path."""
    return os.path.expanduser(url.removeprefix("file://"))


def expand(pattern: str) -> Iterator[str]:
    """Every name of a brace pattern: `s-{000..099}.tar`, `{a,b}.tar`. A range keeps its leading zeros."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    inside = found.group(1)
    if span := _RANGE.fullmatch(inside):
        first, last = span.groups()
        if int(last) < int(first):
            raise ValueError(f"data.urls={pattern}: the range {{{inside}}} goes backwards")
        choices: Iterable[str] = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    else:
        choices = inside.split(",")
    for choice in choices:
        yield from expand(pattern[: found.start()] + choice + pattern[found.end() :])


def addresses(urls: Any) -> list[str]:
    """Every address of `data.urls`: a pattern or a list of them; none for None. Raises ValueError for anything else."""
    patterns = [urls] if isinstance(urls, str) else urls or []
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"data.urls={urls}: must be an address, a brace pattern such as s-{{000..099}}.tar, or a list")
    return [url for pattern in patterns for url in expand(pattern)]


def names_fingerprint(shards: Sequence[Shard]) -> str:
    """Fingerprint of the shards' names and sizes, in order. It does not depend on their place and dates."""
    return digest("\n".join(f"{shard.name} {shard.size}" for shard in shards).encode())
