"""Tar archives as webdataset writes them: members whose names are equal up to the first dot make a sample.

A member's header is 512 bytes with a checksum, so every step from member to member is verified. What a reader must not
do is take an archive that ends early for a short one: an archive ends with two blocks of zeros, and one that does
not was cut, perhaps between the files of a sample.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

_BLOCK = tarfile.BLOCKSIZE
_EXTENDED = {tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK}
_MOST_EXTENDED = 1 << 20  # bytes of an extended header: a larger one is garbage
_PIECE = 1 << 20  # bytes of a member read at once


class Bytes(Protocol):
    """A file read from its beginning to its end."""

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        ...


class Broken(Exception):
    """The archive cannot be read from `byte` on."""

    def __init__(self, byte: int, reason: str) -> None:
        super().__init__(reason)
        self.byte, self.reason = byte, reason


@dataclass(frozen=True)
class Member:
    """A regular file of an archive. Offsets are bytes of the archive."""

    name: str
    header: int  # where its headers begin, extended ones included
    data: int
    size: int

    @property
    def end(self) -> int:
        """The byte after its last block."""
        return self.data + -(-self.size // _BLOCK) * _BLOCK

    @property
    def key(self) -> str:
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.partition(".")[0]

    @property
    def extension(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2]


class Reader:
    """Reads an archive through, from a byte at which a header stands."""

    def __init__(self, file: Bytes, byte: int = 0, end: int | None = None) -> None:
        """`end`: where to stop, for a part of an archive; None: at the archive's own end."""
        self._file, self._byte, self._end = file, byte, end
        self.check = 0  # CRC-32 of the member read last, its headers included

    def members(self) -> Iterator[tuple[Member, bytes]]:
        """Every member that is a regular file, with its content. Raises Broken."""
        begin, named = self._byte, dict[str, str]()
        while self._end is None or self._byte < self._end:
            at = self._byte
            if at == begin:
                self.check = 0
            info = self._header()
            if info is None:
                return
            if info.type in _EXTENDED:
                if info.size > _MOST_EXTENDED:
                    raise Broken(at, f"an extended header of {info.size} bytes")
                named |= _extended(info, self._content(at, info.size), at)
                continue
            size, name = int(named.get("size", info.size)), named.get("path", info.name)
            member = Member(name, begin, self._byte, size if info.isreg() else 0)
            content = self._content(at, member.size)
            named = {}
            if info.isreg():
                yield member, content
            begin = self._byte

    def _header(self) -> tarfile.TarInfo | None:
        at, block = self._byte, self._take(_BLOCK)
        if len(block) < _BLOCK:
            what = f"it ends inside a header of {len(block)} bytes" if block else "it ends without its end marker"
            raise Broken(at, f"{what}: the archive was cut short")
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            if self._take(_BLOCK).strip(b"\0") or self._byte != at + 2 * _BLOCK:
                raise Broken(at, "one block of zeros where the end marker has two") from None
            return None
        except tarfile.HeaderError as error:
            raise Broken(at, f"garbage where a header should be: {error}") from error

    def _content(self, header: int, size: int) -> bytes:
        at, pieces, left = self._byte, [], -(-size // _BLOCK) * _BLOCK
        while left:
            pieces.append(self._take(min(left, _PIECE)))
            left -= len(pieces[-1])
            if not pieces[-1]:
                held = sum(map(len, pieces))
                raise Broken(at + held, f"it ends inside a member of {size} bytes: the archive was cut short")
        return b"".join(pieces)[:size]

    def _take(self, size: int) -> bytes:
        found = self._file.read(size)
        self._byte += len(found)
        self.check = zlib.crc32(found, self.check)
        return found


@dataclass(frozen=True)
class Sample:
    """Where a sample lies: bytes `begin` to `end`, and a CRC-32 over the CRC-32 of each member with its headers."""

    key: str
    begin: int
    end: int
    check: int
    extensions: tuple[str, ...]


def samples(reader: Reader) -> Iterator[tuple[Sample, dict[str, bytes]]]:
    """Every sample and the contents of its members by extension. Raises Broken after the last sample before it."""
    sample, contents = None, dict[str, bytes]()
    try:
        for member, content in reader.members():
            if sample is not None and sample.key != member.key:
                yield sample, contents
                sample, contents = None, {}
            before = sample or Sample(member.key, member.header, member.end, 0, ())
            check = zlib.crc32(reader.check.to_bytes(4, "little"), before.check)
            sample = replace(before, end=member.end, check=check, extensions=(*before.extensions, member.extension))
            contents[member.extension] = content
    except Broken:
        if sample is not None:
            yield sample, contents
        raise
    if sample is not None:
        yield sample, contents


@dataclass(frozen=True)
class Index:
    """The samples of an archive, and from which byte on it is damaged, if it is."""

    samples: tuple[Sample, ...]
    broken: tuple[int, str] | None = None  # byte, reason

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": [[s.key, s.begin, s.end, s.check, list(s.extensions)] for s in self.samples],
            "broken": self.broken,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Index:
        found = tuple(Sample(key, begin, end, check, tuple(rest)) for key, begin, end, check, rest in values["samples"])
        return cls(found, None if values["broken"] is None else (values["broken"][0], values["broken"][1]))


def build_index(file: Bytes) -> Index:
    """Read an archive through. In one that is cut short, a last sample with fewer files than the first is lost too."""
    found: list[Sample] = []
    try:
        found.extend(sample for sample, _ in samples(Reader(file)))
    except Broken as error:
        if len(found) > 1 and len(found[-1].extensions) < len(found[0].extensions):
            return Index(tuple(found[:-1]), (found[-1].begin, f"the last sample lacks files, and then {error.reason}"))
        return Index(tuple(found), (error.byte, error.reason))
    return Index(tuple(found))


def dump(index: Index, size: int) -> bytes:
    """`index` of an archive of `size` bytes, as a file beside it."""
    return json.dumps({"format": 1, "size": size, **index.to_json()}).encode()


def load(data: bytes, size: int) -> Index | None:
    """The inverse of `dump`; None for what is no index of an archive of `size` bytes."""
    try:
        values = json.loads(data)
        if values["format"] != 1 or values["size"] != size:
            return None
        return Index.from_json(values)
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def _extended(info: tarfile.TarInfo, content: bytes, at: int) -> dict[str, str]:
    """What an extended header says of the member after it: `path` and `size`."""
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if info.type != tarfile.XHDTYPE:
        return {}
    found = {}
    while content:  # records of "LENGTH KEY=VALUE\n" (POSIX pax)
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or not 0 < int(digits) <= len(content):
            raise Broken(at, "a garbled extended header")
        key, _, value = content[len(digits) + 1 : int(digits) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        content = content[int(digits) :]
    return {key: found[key] for key in ("path", "size") if key in found}
