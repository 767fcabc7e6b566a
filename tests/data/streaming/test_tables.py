"""`data=hf`: row groups, record batches, lines, and what `datasets` streams."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stoker.conf.schema import BatchConfig, Config, DataConfig
from stoker.data.remote import Damaged, refuse
from stoker.data.remote.store import Store
from stoker.data.streaming.tables import open_hf
from tests.data.server import serving
from tests.data.streaming.conftest import documents, open_stream, write_lines
from tests.data.streaming.simulated import batches, digests

TEXTS = documents(240)


def write_tables(folder: Path, kind: str) -> None:
    folder.mkdir(parents=True)
    for shard in range(3):
        numbers = list(range(80 * shard, 80 * shard + 80))
        blobs = [random.Random(n).randbytes(6000) for n in numbers]  # large beside the 64 KiB that a footer takes
        columns = {"id": numbers, "text": [TEXTS[n] for n in numbers], "ids": [[n, 7] for n in numbers], "blob": blobs}
        table = pa.table(columns)
        path = folder / f"{shard}.{kind}"
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=16, write_page_checksum=True, compression="none")
        else:
            make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
            if kind == "stream":  # dictionaries come before the batches that use them
                table = table.set_column(1, "text", table["text"].dictionary_encode())
                path = folder / f"{shard}.arrow"
            with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=16)


@pytest.fixture(params=["parquet", "arrow", "stream"])
def config(request, tmp_path: Path) -> Config:
    """Three shards of 80 rows, in splits of 16."""
    write_tables(tmp_path / "tables", request.param)
    data = DataConfig(
        target="stoker.data.streaming.sources:streamed_only",
        splits="stoker.data.streaming.tables:open_hf",
        name="hf",
        path=str(tmp_path / "tables"),
        validation=0.0,
        mode="streaming",
        streams=4,
        shuffle_window=2,
        split_bytes=2048,
        assign_every=2,
        epochs=1,
    )
    return Config(data=data, seq_len=64, batch=BatchConfig(size=8))


def read_all(config: Config, split: int | None = None) -> list:
    splits = open_hf(config.data)
    chosen = range(len(splits)) if split is None else [split]
    return [content for number in chosen for _, content in splits.read(number, Store(), refuse)]


def test_units_are_row_groups_and_record_batches(config):
    assert len(open_hf(config.data)) == 15
    assert read_all(config) == TEXTS
    assert read_all(config, 7) == TEXTS[112:128]
    config.data.args = {"column": "ids"}
    assert [ids.tolist() for ids in read_all(config)] == [[n, 7] for n in range(240)]
    config.data.args = {"map": "tests.data.streaming.test_tables:even"}
    assert read_all(config) == [f"{n} {TEXTS[n]}" for n in range(0, 240, 2)]


def even(row: dict) -> str | None:
    return None if row["id"] % 2 else f"{row['id']} {row['text']}"


def test_one_piece_is_requested_and_not_the_shard(config, tmp_path):
    with serving(tmp_path / "tables") as server:
        name = next((tmp_path / "tables").iterdir()).suffix
        opened = partial(open_stream, config)
        local = digests(batches(opened, None))
        config.data.path, config.data.urls = None, [f"{server.url}/{{0..2}}{name}"]
        assert digests(batches(opened, None, [{"dp": 2, "batches": 3}, {"dp": 4}])) == local
        splits, store = open_hf(config.data), Store()
        server.sent.clear()
        assert [text for _, text in splits.read(7, store, refuse)] == TEXTS[112:128]
        size = (tmp_path / "tables" / f"1{name}").stat().st_size
        assert set(server.sent) == {f"/1{name}"} and sum(server.sent.values()) < size / 3


def test_what_is_no_table_or_has_no_such_column_is_named(config, tmp_path):
    path = sorted((tmp_path / "tables").iterdir())[1]
    config.data.args = {"column": "body"}
    with pytest.raises(Damaged, match=f"{path.parent}/0.*: no column 'body': it has id, text, ids, blob"):
        read_all(config)
    config.data.args = {"column": "id"}
    with pytest.raises(Damaged, match="row 0 of piece 0: column 'id' is int, neither text nor token ids"):
        read_all(config)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=rf"cannot use {path}.*: it is no (parquet|arrow) file"):
        open_hf(config.data)
    (tmp_path / "tables" / "x.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"holds an? .* file and a table of .* values, such as 0.* and x.csv: pick"):
        open_hf(config.data)


def test_a_flipped_bit_of_parquet_is_found_by_its_checksums(tmp_path, config):
    path = tmp_path / "tables" / "1.parquet"
    if not path.exists():
        pytest.skip("arrow files have no checksums")
    data = bytearray(path.read_bytes())
    at = data.index(TEXTS[100].encode())
    data[at + 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match=r"1.parquet, sample piece 1: it cannot be read: .*CRC"):
        read_all(config, 6)


def test_lines_are_read_by_blocks_with_columns_and_functions(config, tmp_path):
    write_lines(tmp_path / "lines", TEXTS)
    config.data.path = str(tmp_path / "lines")
    assert sorted(read_all(config)) == sorted(TEXTS)
    config.data.args = {"map": "tests.data.streaming.test_tables:even"}
    assert sorted(read_all(config)) == sorted(f"{n} {TEXTS[n]}" for n in range(0, 240, 2))


def test_what_datasets_streams_is_read_by_the_pieces_of_its_format(config, tmp_path):
    if not (tmp_path / "tables" / "0.parquet").exists():
        pytest.skip("once is enough")
    direct = open_hf(config.data)
    config.data.args = {"dataset": str(tmp_path / "tables")}
    splits = open_hf(config.data)
    assert len(splits) == len(direct) == 15
    assert read_all(config) == TEXTS
    expected = digests(batches(partial(open_stream, config), None))
    splits = [{"dp": 2, "batches": 2}, {"dp": 4, "workers": 1}]
    assert digests(batches(partial(open_stream, config), None, splits)) == expected
    config.data.args = {"dataset": str(tmp_path / "nothing")}
    with pytest.raises(ValueError, match=r"data.args.dataset=.*nothing cannot be opened"):
        open_hf(config.data)
