"""What `stoker teach` stores: a teacher's predictions for the rows of indexed data, and how rows get them.

A folder holds `teacher.json` and for each split and source a file of numbers, with a CRC32 for each row: a row that was
not written, or that changed since, has another. Rows are numbered as their source has them in one epoch, unshuffled, so
that neither the seed nor the mixture of a run matters to them.

    SPLIT-NUMBER.rows   for each row int32 [k, seq_len], tokens, then the bits of fp32 [k, seq_len], log-probabilities;
                        with k = 0 those of the labels alone, fp32 [1, seq_len]
    SPLIT-NUMBER.crc    uint32 [rows]
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stoker.conf.durable import write_whole
from stoker.data.keys import TaughtKey, compare, described

FORMAT = 1
FILE = "teacher.json"


@dataclass(frozen=True)
class TaughtRows:
    """Those of one source. Plain files: readers can be forked.

    `k` tokens a label, or 0: the log-probability of the label alone.
    """

    folder: Path
    name: str  # of the files, without the ending
    k: int
    rows: int
    seq_len: int
    vocab_size: int

    @property
    def planes(self) -> int:
        """int32 numbers for each token of a row."""
        return 2 * self.k or 1

    def create(self) -> None:
        """Make the files, without values."""
        for ending, size in ((".rows", self.rows * self._row_bytes), (".crc", 4 * self.rows)):
            with open(self.folder / f"{self.name}{ending}", "wb") as file:
                file.truncate(size)

    def write(self, row: int, tokens: np.ndarray, log_probabilities: np.ndarray) -> None:
        """Of `row`: int32 `[k, seq_len]` and fp32 `[k or 1, seq_len]`."""
        data = tokens.astype(np.int32).tobytes() + log_probabilities.astype(np.float32).tobytes()
        assert len(data) == self._row_bytes
        for ending, size, part in (
            (".rows", self._row_bytes, data),
            (".crc", 4, zlib.crc32(data).to_bytes(4, "little")),
        ):
            with open(self.folder / f"{self.name}{ending}", "r+b") as file:
                os.pwrite(file.fileno(), part, row * size)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Write the numbers of `rows` (int64) to `out`, int32 `[planes, rows, seq_len]`.

        Raises ValueError naming file and row for one that is damaged or that was never written.
        """
        numbers = np.memmap(self.folder / f"{self.name}.rows", np.int32, "r").reshape(self.rows, self.planes, -1)
        sums = np.memmap(self.folder / f"{self.name}.crc", np.uint32, "r")
        for place, row in enumerate(rows.tolist()):
            found = numbers[row]
            if zlib.crc32(found) != sums[row]:
                raise ValueError(f"{self.folder / self.name}.rows: row {row} is damaged, or was never written")
            tokens = found[: self.k]
            if self.k and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
                raise ValueError(f"{self.folder / self.name}.rows: row {row} has tokens outside the vocabulary")
            out[:, place] = found

    @property
    def _row_bytes(self) -> int:
        return 4 * self.planes * self.seq_len

    def check_sizes(self) -> None:
        """Raises ValueError for a file of another size than these rows have."""
        for ending, size in ((".rows", self.rows * self._row_bytes), (".crc", 4 * self.rows)):
            path = self.folder / f"{self.name}{ending}"
            found = path.stat().st_size if path.is_file() else 0
            if found != size:
                raise ValueError(f"{path}: {found} bytes, and {self.rows} rows of {self.seq_len} tokens have {size}")


@dataclass(frozen=True)
class Lessons:
    """A folder that `stoker teach` wrote."""

    folder: Path
    k: int
    vocab_size: int
    teacher: str  # what it was, for messages
    sources: Mapping[str, Sequence[Mapping[str, Any]]]  # of each split, in order: name, rows, key

    def rows(self, split: str, number: int, key: TaughtKey, rows: int) -> TaughtRows:
        """Those of the source `number` of a split. Raises ValueError, with what differs, for other rows."""
        held = self.sources.get(split, ())
        if number >= len(held):
            raise ValueError(
                f"{self.folder}: it has no rows of {split} source {number + 1}; `stoker teach` writes them"
            )
        found = compare(key.values(), held[number]["key"])
        if found.different or found.unrecorded or held[number]["rows"] != rows:
            names = ", ".join(map(described, (*found.different, *found.unrecorded))) or "the number of rows"
            raise ValueError(f"{self.folder} was made for other rows: {names} differ; `stoker teach` makes new ones")
        taught = TaughtRows(self.folder, f"{split}-{number}", self.k, rows, key.seq_len, self.vocab_size)
        taught.check_sizes()
        return taught


def open_lessons(folder: Path) -> Lessons:
    """Raises ValueError for a folder that `stoker teach` has not written to its end."""
    path = folder / FILE
    try:
        values = json.loads(path.read_text("utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"{path} has the format {values['format']}, and this version reads {FORMAT}")
        k, vocab_size, sources = int(values["k"]), int(values["vocab_size"]), dict(values["sources"])
        for split in sources.values():
            for source in split:
                dict(source["key"]), int(source["rows"])
        return Lessons(folder, k, vocab_size, str(values["teacher"]), sources)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {FILE}: `stoker teach {folder}` writes it at its end") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what `stoker teach` writes ({error})") from error


def write_lessons(folder: Path, k: int, vocab_size: int, teacher: str, sources: Mapping[str, Any]) -> None:
    """Last of all: the folder is whole."""
    values = {"format": FORMAT, "k": k, "vocab_size": vocab_size, "teacher": teacher, "sources": sources}
    write_whole(folder / FILE, json.dumps(values, indent=1).encode(), sync=True)
