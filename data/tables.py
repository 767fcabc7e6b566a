"""Row tables in files: made once for a split, a packing and a row length, then mapped.

<data.cache>/table-<key>/firsts, begins, lengths    see `stoker.data.packing.Table`
                         meta.json                  counts and CRC-32s
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stoker.conf.durable import sync_directory
from stoker.conf.records import parse_json
from stoker.data.build import write_file
from stoker.data.cache import lock
from stoker.data.keys import RowTableKey, SourceKey
from stoker.data.packing import Table, best_fit, padded, together
from stoker.data.tokens import Tokens

log = logging.getLogger(__name__)

_FORMAT = 2
_BUILD: dict[str, Callable[[np.ndarray, np.ndarray, int], Table]] = {"best_fit": best_fit, "padded": padded}
_DTYPES = {"firsts": "int64", "begins": "int64", "lengths": "int32"}
_BLOCK = 4 << 20  # bytes written at a time


def open_table(root: Path, source: SourceKey, split: str, tokens: Tokens, packing: str, seq_len: int) -> Table | None:
    """The rows of `tokens`, the `split` of `source`, under `packing`; None where they need no table.

    Made under `root` first if it is not there or is damaged. Raises ValueError for a root that cannot be written.
    """
    if packing not in _BUILD:
        return None
    folder = root / f"table-{RowTableKey(_FORMAT, source, split, packing, seq_len).key}"
    found = _read(folder)
    if found is None:
        try:
            with lock(folder.with_suffix(".lock")):
                found = _read(folder)
                if found is None:
                    _write(folder, _made(tokens, packing, seq_len))
                    found = _read(folder)
        except OSError as error:
            problem = f"cannot keep rows in {root}: {error.strerror or error}"
            raise ValueError(f"{problem}; name another data.cache") from error
        assert found is not None
    return found


def _made(tokens: Tokens, packing: str, seq_len: int) -> Table:
    if tokens.documents_together == 1:
        return _BUILD[packing](tokens.starts, tokens.lengths(), seq_len)
    return together(tokens.starts, tokens.lengths(), seq_len, tokens.documents_together, packing == "best_fit")


def verify_table(folder: Path) -> list[str]:
    """Read every byte and compare with the sums of the meta; what is wrong, a line each."""
    try:
        meta = parse_json((folder / "meta.json").read_text())
        return [
            f"{folder / name}: its CRC-32 is {crc:08x}, and it was written with {meta['crc32'][name]:08x}"
            for name in _DTYPES
            if (crc := zlib.crc32((folder / name).read_bytes())) != meta["crc32"][name]
        ]
    except (OSError, ValueError, KeyError) as error:
        return [f"{folder} holds no row table: {error}"]


def _read(folder: Path) -> Table | None:
    if not folder.is_dir():
        return None
    try:
        counts = parse_json((folder / "meta.json").read_text())["counts"]
        arrays = {}
        for name, dtype in _DTYPES.items():
            count, path = counts[name], folder / name
            if path.stat().st_size != count * np.dtype(dtype).itemsize:
                raise ValueError(f"{name} has {path.stat().st_size} bytes, not {count} x {np.dtype(dtype).itemsize}")
            arrays[name] = np.memmap(path, dtype, "r").view(np.ndarray) if count else np.empty(0, dtype)
    except (OSError, ValueError, KeyError) as error:
        log.warning("the row table %s is damaged and made again: %s", folder, error)
        return None
    return Table(**arrays)


def _write(folder: Path, table: Table) -> None:
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a builder that was killed
    unfinished.mkdir(parents=True)
    arrays = {name: getattr(table, name).astype(dtype, copy=False) for name, dtype in _DTYPES.items()}
    sums = {}
    for name, values in arrays.items():
        flat = memoryview(values.view(np.uint8))
        sums[name] = write_file(unfinished / name, (flat[at : at + _BLOCK] for at in range(0, len(flat), _BLOCK)))
    meta = {"counts": {name: len(values) for name, values in arrays.items()}, "crc32": sums}
    write_file(unfinished / "meta.json", [json.dumps(meta).encode()])
    sync_directory(unfinished)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    sync_directory(folder.parent)
