"""Data to evaluate under data.mode=streaming: documents kept out of training, or in it, as counted tokens.

Which documents are kept for validation is known only when they are read. So the windows of a source are read one after
the other, until their documents make enough rows, which are kept below `data.cache` for the next start. The
order does not depend on the run's seed: every run over the same data evaluates the same documents.
"""

from __future__ import annotations

import io
import logging
import os
from bisect import bisect_left
from pathlib import Path

import numpy as np

from stoker.data.cache import lock
from stoker.data.keys import HeldOutKey
from stoker.data.remote.store import Store
from stoker.data.streaming.packed import Packed, Packing
from stoker.data.streaming.shuffle_windows import ShuffleWindows, Window
from stoker.data.tokens import Tokens

log = logging.getLogger(__name__)


def sampled(root: Path, windows: ShuffleWindows, packing: Packing, rows: int, store: Store) -> tuple[str, Tokens]:
    """The fingerprint and the tokens of the first documents of `windows`: enough for `rows` rows, or all of an epoch.
    Kept in a file below `root`.

    Raises ValueError for data that cannot be read and a `root` that cannot be written.
    """
    split = "validation" if windows.held_out else "train"
    content = HeldOutKey(3, windows.key, rows, packing.seq_len, packing.name, windows.skipping, split).key
    path = root / f"held-out-{content}.npz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.with_suffix(".lock")):
            found = _stored(path)
            if found is None:
                found = _read(windows, packing, rows, store)
                _store(path, found)
    except OSError as error:
        problem = f"cannot keep the documents to evaluate of {windows.name} in {root}: {error.strerror or error}"
        raise ValueError(f"{problem}; name another data.cache") from error
    return content, found


def _read(windows: ShuffleWindows, packing: Packing, rows: int, store: Store) -> Tokens:
    def amount(documents: int) -> int:
        end = int(starts[documents]) if documents < len(starts) else len(ids)
        return Packed(Window(ids[:end], starts[:documents], (), 0, 0), packing).amount

    ids, starts = np.empty(0, np.uint32), np.empty(0, np.int64)
    wanted = rows * packing.need + packing.overlap
    for number in range(windows.per_epoch):
        window = windows.read(number, store)
        starts = np.concatenate([starts, window.starts + len(ids)])
        ids = np.concatenate([ids, window.ids.astype(np.uint32)])
        if amount(len(starts)) >= wanted:
            break
    split = "validation" if windows.held_out else "train"
    log.info("%s: the %s documents of %d windows make %d tokens", windows.name, split, number + 1, len(ids))
    if packing.name == "concatenated":  # no more than needed: in a mixture, each source has its share
        return Tokens(ids[:wanted], starts[starts < wanted])
    few = bisect_left(range(len(starts)), wanted, key=amount)
    return Tokens(ids[: starts[few]] if few < len(starts) else ids, starts[:few])


def _store(path: Path, tokens: Tokens) -> None:
    data = io.BytesIO()
    np.savez(data, ids=np.asarray(tokens.ids[:]), starts=tokens.starts)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data.getvalue())
    temporary.replace(path)


def _stored(path: Path) -> Tokens | None:
    """The tokens kept at `path`; None without any, or for a damaged file: a zip archive holds checksums."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Tokens(arrays["ids"], arrays["starts"])
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile and NumPy raise different errors
        log.warning("%s is damaged and made again: %s", path, error)
        return None
