"""Decompression in bounded memory, of gzip, bzip2, xz and zstd: every byte of a file is used, or it is an error.

The libraries' file objects ignore bytes after the last stream of a .bz2 or .xz file, and zstandard's reader ignores a
last frame that is cut short. Here a stream that is cut short and bytes that belong to no stream are errors.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from stoker.conf.schema import DataConfig

_PIECE = 1 << 20  # bytes of text yielded at once, about
# Bytes given to zstd at a time: a block of 4 bytes may expand to 128 KiB, so these are 32 MiB of text at most.
_ZSTD_INPUT = 1 << 10
_ZSTD_SKIPPABLE = tuple(bytes([low, 0x2A, 0x4D, 0x18]) for low in range(0x50, 0x60))
_BZIP2 = tuple(b"BZh%d" % level + mark for level in range(1, 10) for mark in (b"1AY&SY", b"\x17rE8P\x90"))


class TooLarge(ValueError):
    """Data beyond a limit of the config: refused, and never skipped as damage is."""


@dataclass(frozen=True)
class Limits:
    """How much memory a compressed file may take."""

    window_log: int = 27  # data.zstd_window_log
    held_bytes: int = 1 << 30  # data.max_decompressed_gib

    def too_large(self, what: str) -> TooLarge:
        gib = self.held_bytes / 2**30
        return TooLarge(f"{what} takes more than data.max_decompressed_gib={gib:g} of memory: a larger value reads it")


def limits_of(config: DataConfig) -> Limits:
    return Limits(config.zstd_window_log, int(config.max_decompressed_gib * 2**30))


@dataclass(frozen=True)
class Compression:
    """A format of compressed files, recognised by its first bytes."""

    name: str
    magics: tuple[bytes, ...]
    endings: tuple[str, ...]  # of file names, in small letters
    command: str  # that decompresses a file to its standard output
    streams: Callable[[Limits], Callable[[], Any]]  # limits -> a decompressor for each stream of a file


class _Zlib:
    """A gzip member, read as bz2 and lzma read theirs."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    def decompress(self, data: bytes, most: int) -> bytes:
        found = self._inner.decompress(self._inner.unconsumed_tail + data, most)
        self.needs_input = not self._inner.unconsumed_tail and len(found) < most
        return found

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


class _Zstd:
    """A zstd frame, fed in small pieces: the library returns all that they expand to."""

    def __init__(self, limits: Limits) -> None:
        import zstandard

        self._error, self._limits = zstandard.ZstdError, limits
        self._inner = zstandard.ZstdDecompressor(max_window_size=1 << limits.window_log).decompressobj()
        self._data, self._at = b"", 0  # not yet fed to the library from there on

    def decompress(self, data: bytes, most: int) -> bytes:
        self._data, self._at = self._data[self._at :] + data, 0
        found, size = [], 0
        while size < most and not self._inner.eof and not self.needs_input:
            given = self._data[self._at : self._at + _ZSTD_INPUT]
            self._at += len(given)
            found.append(self._decompress(given))
            size += len(found[-1])
        return b"".join(found)

    def _decompress(self, data: bytes) -> bytes:
        try:
            return self._inner.decompress(data)
        except self._error as error:
            if "too much memory" in str(error):
                raise TooLarge(
                    f"its zstd window is larger than data.zstd_window_log={self._limits.window_log} allows: "
                    "data.zstd_window_log=31 reads every file, with up to 2 GiB of memory for each reader"
                ) from error
            raise OSError(str(error)) from error

    @property
    def needs_input(self) -> bool:
        return self._at == len(self._data)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data + self._data[self._at :]


COMPRESSIONS = (
    Compression("gzip", (b"\x1f\x8b",), (".gz", ".gzip", ".tgz"), "gzip -dc", lambda limits: _Zlib),
    Compression(
        "zstd",
        (b"\x28\xb5\x2f\xfd", *_ZSTD_SKIPPABLE),
        (".zst", ".zstd", ".tzst"),
        "zstd -dc --long=31",
        lambda limits: lambda: _Zstd(limits),
    ),
    Compression("bzip2", _BZIP2, (".bz2", ".tbz2", ".tbz"), "bzip2 -dc", lambda limits: bz2.BZ2Decompressor),
    Compression("xz", (b"\xfd7zXZ\x00",), (".xz", ".txz"), "xz -dc", lambda limits: lzma.LZMADecompressor),
)


def compression_of(head: bytes) -> Compression | None:
    """The compression of a file that begins with `head`; None for an uncompressed one."""
    return next((one for one in COMPRESSIONS if head.startswith(one.magics)), None)


def decompressed(pieces: Iterable[bytes], compression: Compression | None, limits: Limits) -> Iterator[bytes]:
    """The contents of a file whose bytes are `pieces`, in pieces: those of all its streams, one after the other.

    Raises EOFError for a file that is cut short, OSError for one that is damaged or has bytes after its end, and
    TooLarge for data beyond the limits.
    """
    if compression is None:
        yield from pieces
        return
    make, stream = compression.streams(limits), None
    for piece in pieces:
        data = piece
        while data or (stream is not None and not stream.needs_input):
            if stream is None:
                data = data.lstrip(b"\0") if compression.name in ("gzip", "xz") else data  # padding
                if not data:
                    break
                stream = make()
            try:
                found = stream.decompress(data, _PIECE)
            except (zlib.error, lzma.LZMAError, EOFError, OSError) as error:
                problem = f"its {compression.name} stream is damaged, or bytes follow its end: {error}"
                raise OSError(problem) from error
            data = b""
            if found:
                yield found
            if stream.eof:
                data, stream = stream.unused_data, None
    if stream is not None:
        raise EOFError(f"its last {compression.name} stream is cut short")


def lines(pieces: Iterable[bytes], limits: Limits) -> Iterator[bytes]:
    """The lines of a text in `pieces`. Raises TooLarge for a line beyond the limits."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        first, *others = piece.split(b"\n")
        held.append(first)
        size += len(first)
        if size > limits.held_bytes:
            raise limits.too_large("a line")
        if others:
            yield b"".join(held)
            yield from others[:-1]
            held, size = [others[-1]], len(others[-1])
    if size:
        yield b"".join(held)


def whole(pieces: Iterable[bytes], limits: Limits) -> bytes:
    """All of a text in `pieces`. Raises TooLarge for one beyond the limits."""
    held, size = [], 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size > limits.held_bytes:
            raise limits.too_large("it")
    return b"".join(held)


class PiecesFile(io.RawIOBase):
    """Pieces of bytes as the file that a library reads from its beginning to its end."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        super().__init__()
        self._pieces, self._held = iter(pieces), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._held = piece
        found, self._held = self._held[: len(buffer)], self._held[len(buffer) :]
        buffer[: len(found)] = found
        return len(found)
