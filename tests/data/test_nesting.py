"""Files of others that are nested too deeply, or of another shape than ours, are one clear error wherever they are."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stoker.data.cache import META, open_folder
from stoker.data.decompress import Limits, TooLarge
from stoker.data.formats import PARQUET, Kind
from stoker.data.remote.shards import Shard
from stoker.data.remote.store import Store
from stoker.data.table_files import read_piece
from stoker.data.tokenizer_files import load_kept, load_tokenizer
from stoker.models.hugging_face_config import read_json

DEEP = "[" * 20_000 + "]" * 20_000


@pytest.mark.parametrize("content", [DEEP, "[]", "{}", '{"kind": []}', '{"kind": "hub"}', '{"kind": "tiktoken"}', "1"])
def test_a_kept_tokenizer_is_read_or_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "stoker.json").write_text(content)
    (tmp_path / "tokens.tiktoken").touch()
    with pytest.raises((ValueError, OSError)):
        load_kept(tmp_path)


def test_deep_json_of_a_model_a_tokenizer_or_a_cache_is_named(tmp_path: Path) -> None:
    for name in ("config.json", META, "tokenizer.json"):
        (tmp_path / name).write_text(DEEP)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON: it is nested too deeply"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match="nested too deeply"):
        open_folder(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_row_group_may_take_no_more_memory_than_the_key_allows(tmp_path: Path, dictionary: bool) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["x" * 100_000] * 300})  # 30 MB, and 100 kB of it in the file's dictionary
    pq.write_table(table, path, use_dictionary=dictionary, compression="zstd")
    assert path.stat().st_size < 100_000
    shard = Shard(str(path), path.stat().st_size)

    def read(held: int) -> int:
        return sum(1 for _ in read_piece(Kind(PARQUET), shard, Store(), Limits(held_bytes=held), 0, None))

    assert read(100 << 20) == 300
    with pytest.raises(TooLarge, match=r"row group 0 of .*a\.parquet takes more than data\.max_decompressed_gib"):
        read(8 << 20)
