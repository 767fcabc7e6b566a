"""Tar archives with members of every kind, made with Python's tarfile: webdataset's writer makes plain files only."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

from stoker.data.remote import Leftover, Loss, refuse
from stoker.data.streaming.sources import open_store
from stoker.data.streaming.webdataset import open_webdataset

END = bytes(1024)


@dataclass(frozen=True)
class Entry:
    """A member. `kind`: a type of tarfile's, or `sparse`: a hole of 1,000 bytes, and `content`."""

    name: str
    content: bytes = b""
    kind: bytes | str = tarfile.REGTYPE


def archive(
    entries: Sequence[Entry], format: int = tarfile.GNU_FORMAT, pax_headers: dict[str, str] | None = None
) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, pax_headers=pax_headers) as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            content = entry.content
            tar.format = tarfile.PAX_FORMAT if entry.kind == "sparse" else format
            if entry.kind == "sparse":  # GNU's extended sparse format 1.0: the map first, then what is no hole
                info.name = f"GNUSparseFile.0/{entry.name}"
                info.pax_headers = {
                    "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": entry.name,
                    "GNU.sparse.realsize": str(1000 + len(content)),
                }  # fmt: skip
                content = f"1\n1000\n{len(content)}\n".encode().ljust(512, b"\0") + content
            else:
                assert isinstance(entry.kind, bytes)
                info.type = entry.kind
                info.linkname = "elsewhere" if entry.kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(content) if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES else 0
            tar.addfile(info, io.BytesIO(content) if info.size else None)
    return file.getvalue()


def files(*named: tuple[str, str]) -> list[Entry]:
    return [Entry(name, text.encode()) for name, text in named]


def read(config) -> tuple[list, list[Leftover]]:
    """Every document of `data=webdataset`, and the members that are none. Raises the error of a refusal."""
    splits = open_webdataset(config)
    leftovers: list[Leftover] = []

    def report(found: Loss | Leftover) -> None:
        refuse(found)
        assert isinstance(found, Leftover)
        leftovers.append(found)

    store = open_store(config)
    documents = [content for split in range(len(splits)) for _, content in splits.read(split, store, report)]
    return documents, leftovers
