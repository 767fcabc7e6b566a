"""Tar archives of samples: headers read by Python's tarfile, members grouped into samples by webdataset.

Both stop without an error where an archive is cut short or garbled, and webdataset skips members of no sample. Here
every byte of an archive is accounted for: each member belongs to a sample or is `Left`, an archive ends with its end
marker, and nothing but zeros follows it.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Protocol, cast

from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from stoker.data.remote import Damaged

_BLOCK = tarfile.BLOCKSIZE
_PIECE = 1 << 20  # bytes of a member read at once
_MOST_HEADERS = 256 << 10  # bytes of all headers of one member: names, attributes, maps of sparse files
MOST_SAMPLE = 1 << 30  # bytes of a sample, which is held in memory
# tarfile's search for the character set of an extended header takes time by the square of a run of digits.
_LONG_NUMBER = re.compile(rb"\d{513}")
_METADATA = re.compile(signature(tar_file_iterator).parameters["skip_meta"].default)
_COMPRESSED = {b"\x1f\x8b": "gzip -dc", b"BZh": "bzip2 -dc", b"\xfd7zXZ": "xz -dc", b"\x28\xb5\x2f\xfd": "zstd -dc"}
_MEMBER_FIELDS = {"path", "size", "linkpath", "hdrcharset"}  # of pax: what a global header must not set


class Bytes(Protocol):
    """A file read from its beginning to its end."""

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        ...


class Broken(Exception):
    """The archive cannot be read from `byte` on. `whole`: it ended well before that."""

    def __init__(self, byte: int, reason: str, whole: bool = False) -> None:
        super().__init__(reason)
        self.byte, self.reason, self.whole = byte, reason, whole


class Compressed(ValueError):
    """Not an archive, but a compressed file. `command` writes its contents to its output."""

    def __init__(self, command: str) -> None:
        super().__init__(f"it is compressed: {command} unpacks it")
        self.command = command


@dataclass(frozen=True)
class Left:
    """A member that is in no sample."""

    byte: int  # where its headers begin
    name: str
    reason: str
    extension: str | None  # of the sample that its name assigns it to; None: of no sample


@dataclass(frozen=True)
class Member:
    """A file of a sample. Offsets are bytes of the archive."""

    name: str
    header: int  # where its headers begin, extended ones included
    end: int  # the byte after its last block
    check: int  # CRC-32 of all of that
    content: bytes


@dataclass(frozen=True)
class Sample:
    """Position of a sample: bytes `begin` to `end`, and a CRC-32 over the CRC-32 of each member with its headers."""

    key: str
    begin: int
    end: int
    check: int
    extensions: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A sample as webdataset makes it: `__key__`, `__url__` and the contents of its members by extension."""

    sample: Sample
    values: dict[str, Any]
    wrong: str | None  # why webdataset refuses it


@dataclass
class Reader:
    """Reads an archive through, from a byte at which a header begins.

    `end`: where to stop, for a part of an archive; None: at the archive's end. `keep`: whether members have their
    contents. `left` is called with each member that is in no sample, except directories.
    """

    file: Bytes
    byte: int = 0
    end: int | None = None
    keep: bool = True
    left: Callable[[Left], None] = field(default=lambda member: None)

    def __post_init__(self) -> None:
        self._source = _Source(self.file, self.byte)
        # For TarInfo.fromtarfile to read from and write to. A TarFile would read ahead, and stop at garbage.
        self._archive = _Archive(self._source)
        self._globals: dict[str, str] = {}

    def members(self) -> Iterator[Member]:
        """The members of samples, in order. Raises Broken and, at the beginning of the archive, Compressed."""
        source = self._source
        while self.end is None or source.at < self.end:
            begin, source.check = source.at, 0
            info = self._header()
            if info is None:
                self._refuse_more()
                return
            size, reason = self._archive.offset - source.at, _why_left(info)
            if size < 0 or (reason is None and size != -(-info.size // _BLOCK) * _BLOCK):
                raise Broken(begin, f"member {info.name}: its headers contradict each other about its size")
            if reason is None and size > MOST_SAMPLE:
                raise Broken(begin, f"member {info.name} has {size} bytes: a sample has {MOST_SAMPLE} at most")
            content = self._content(size, self.keep and reason is None)
            if reason is None:
                yield Member(info.name, begin, source.at, source.check, content[: info.size])
            elif not info.isdir():
                self.left(Left(begin, info.name, reason, _extension(info.name)))

    def _header(self) -> tarfile.TarInfo | None:
        """The next member, all its headers read; None at the end marker."""
        source = self._source
        at = source.at
        source.begin_headers()
        try:
            info = tarfile.TarInfo.fromtarfile(cast(tarfile.TarFile, self._archive))
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            source.begin_headers()
            if source.read(_BLOCK).strip(b"\0") or source.at != at + 2 * _BLOCK:
                raise Broken(at, "one block of zeros where the end marker has two") from None
            return None
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise Broken(at, "it ends without its end marker: the archive was cut short") from None
        except Damaged:  # of the file below
            raise
        except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            for magic, command in _COMPRESSED.items():
                if at == 0 and source.first.startswith(magic):
                    raise Compressed(command) from None
            if source.short:
                what = f"it ends inside a header of {source.at - at} bytes"
                raise Broken(at, f"{what}: the archive was cut short") from error
            raise Broken(at, f"garbage where a header should be: {error}") from error
        if self._archive.pax_headers != self._globals:
            self._refuse_globals(at)
        return info

    def _refuse_globals(self, at: int) -> None:
        """Refuse a global header that changes the members after it: a part of the archive that is read separately would
        miss it."""
        known, now = self._globals, self._archive.pax_headers
        changed = {key for key, value in now.items() if known.get(key) != value}
        if wrong := {key for key in changed if key in _MEMBER_FIELDS or key.startswith("GNU.sparse.")}:
            raise Broken(at, f"a global header that sets {', '.join(sorted(wrong))} of all members after it")
        self._globals = dict(now)

    def _content(self, size: int, keep: bool) -> bytes:
        pieces, left, source = [], size, self._source
        while left:
            piece = source.take(min(left, _PIECE))
            left -= len(piece)
            if not piece:
                raise Broken(source.at, f"it ends inside a member of {size} bytes: the archive was cut short")
            if keep:
                pieces.append(piece)
        return b"".join(pieces)

    def _refuse_more(self) -> None:
        """Check the rest, which may be zeros only: tarfile and webdataset would ignore a second archive there."""
        source = self._source
        while piece := source.take(_PIECE):
            zeros = len(piece) - len(piece.lstrip(b"\0"))
            if zeros == len(piece):
                continue
            where = source.at - len(piece) + zeros
            what = "bytes after the end marker, which readers of tar ignore"
            raise Broken(where, f"{what}: join archives by tar --concatenate, not by cat", whole=True)


def samples(reader: Reader, url: str = "") -> Iterator[Found]:
    """Every sample as webdataset groups members. Raises Broken after the last sample before it, and Compressed."""
    seconds: list[Member] = []  # members that webdataset refuses, of the sample being made
    last: Member | None = None
    broken: Broken | None = None

    def files() -> Iterator[dict[str, Any]]:
        nonlocal last, broken
        try:
            for member in reader.members():
                last = member
                yield {"fname": member.name, "data": member, "__url__": url}
        except Broken as error:  # raised after the present sample
            broken = error

    def refused(error: Exception) -> bool:
        assert last is not None
        seconds.append(last)
        return True  # continue

    for group in group_by_keys(files(), handler=refused):
        yield _found(group, seconds)
        seconds.clear()
    if broken is not None:
        raise broken


def _found(group: dict[str, Any], seconds: list[Member]) -> Found:
    extensions = tuple(name for name, value in group.items() if isinstance(value, Member))
    members: list[Member] = [group[name] for name in extensions]
    if seconds:
        members = sorted([*members, *seconds], key=lambda member: member.header)
    check = 0
    for member in members:
        check = zlib.crc32(member.check.to_bytes(4, "little"), check)
    begin, end = members[0].header, members[-1].end
    if end - begin > MOST_SAMPLE:
        raise Broken(begin, f"sample {group['__key__']} of {end - begin} bytes: at most {MOST_SAMPLE}")
    values = group | {name: group[name].content for name in extensions}
    wrong = None
    if seconds:
        wrong = f"member {seconds[0].name} at byte {seconds[0].header}: a second one of its name, or a reserved name"
    return Found(Sample(group["__key__"], begin, end, check, extensions), values, wrong)


def _why_left(info: tarfile.TarInfo) -> str | None:
    """Why a member is in no sample; None if it is in one."""
    if info.issym() or info.islnk():
        return f"a {'symbolic' if info.issym() else 'hard'} link to {info.linkname}, which has its content"
    if not info.isreg():
        return f"no regular file: its type is {info.type!r}"
    if _METADATA.match(info.name):
        return "metadata, by its name"
    extension = _extension(info.name)
    if extension is None:
        return "a name without an extension"
    if extension == "__bad__":
        return "an extension for which webdataset leaves the sample out"
    return "a sparse file" if info.issparse() else None


def _extension(name: str) -> str | None:
    found = None if _METADATA.match(name) else base_plus_ext(name)[1]
    return None if found is None else found.lower()


class _Source:
    """The bytes of an archive in order, with the position of the next one, and a CRC-32 since its last reset."""

    def __init__(self, file: Bytes, at: int) -> None:
        self._file, self.at, self.check = file, at, 0
        self.first, self.short, self._left = b"", False, 0

    def begin_headers(self) -> None:
        self.first, self.short, self._left = b"", False, _MOST_HEADERS

    def take(self, size: int) -> bytes:
        found = self._file.read(size)
        self.at += len(found)
        self.check = zlib.crc32(found, self.check)
        return found

    def read(self, size: int) -> bytes:
        """A part of a header, for tarfile."""
        self._left -= size
        if self._left < 0:
            raise ValueError(f"extended headers of more than {_MOST_HEADERS} bytes")
        found = self.take(size)
        self.first = self.first or found
        self.short = len(found) < size
        if size != _BLOCK and _LONG_NUMBER.search(found):
            raise ValueError("a number of more than 512 digits in an extended header")
        return found

    def tell(self) -> int:
        return self.at


@dataclass
class _Archive:
    """A stand-in for TarFile, for TarInfo.fromtarfile."""

    fileobj: _Source
    offset: int = 0  # set by it: where the next header begins
    encoding: str = tarfile.ENCODING
    errors: str = "surrogateescape"
    pax_headers: dict[str, str] = field(default_factory=dict)
