from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from stoker.conf.schema import Config, DataConfig
from stoker.data import open_rows, open_tokenizer, prepare, read_rows, vocabulary
from stoker.data.cache import open_folder
from stoker.data.tokens import Joined, View
from tests.data.conftest import cache_of
from tests.data.counted import base

DOCUMENTS = [[5, 6, 7], [8, 9], [1, 2, 3, 4], [11]]
END = 0


def megatron(prefix: Path, documents: list[list[int]], code: int = 8, dtype: str = "uint16") -> None:
    """An indexed dataset of one sequence for each document, as Megatron-LM writes it."""
    sizes = np.array([len(document) for document in documents], np.int32)
    pointers = np.cumsum([0, *sizes[:-1]]).astype(np.int64) * np.dtype(dtype).itemsize
    np.concatenate(documents).astype(dtype).tofile(prefix.with_suffix(".bin"))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    firsts = np.arange(len(sizes) + 1, dtype=np.int64)
    prefix.with_suffix(".idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + firsts.tobytes())


def write_megatron(folder: Path) -> dict[str, object]:
    megatron(folder / "a", [[*document, END] for document in DOCUMENTS[:2]])
    megatron(folder / "b", [[*document, END] for document in DOCUMENTS[2:]], code=4, dtype="int32")
    return {}


def raw(folder: Path, dtype: str) -> dict[str, object]:
    for number in range(2):
        ids = [token for document in DOCUMENTS[2 * number : 2 * number + 2] for token in [*document, END]]
        np.array(ids, dtype).tofile(folder / f"{number}.bin")
    return {"dtype": dtype, "end_of_document": END}


def write_raw_16(folder: Path) -> dict[str, object]:
    return raw(folder, "uint16")


def write_raw_32(folder: Path) -> dict[str, object]:
    return raw(folder, "uint32")


def write_npy(folder: Path) -> dict[str, object]:
    ids = [token for document in DOCUMENTS for token in [*document, END]]
    np.save(folder / "a.npy", np.array(ids, np.uint16))
    return {"end_of_document": END}


def write_olmo(folder: Path) -> dict[str, object]:
    ids = [token for document in DOCUMENTS for token in [*document, END]]
    np.array(ids, np.uint32).tofile(folder / "a.npy")  # OLMo's have no header
    return {"dtype": "uint32", "end_of_document": END}


def config_of(folder: Path, args: dict[str, object], **data: object) -> Config:
    values = {"target": "stoker.data.token_files:open_source", "path": str(folder / "ids"), "tokenizer": None} | data
    config = base(folder, 4, validation=0.0, args=args, **values)
    config.model.vocab_size = 300
    return config


@pytest.mark.parametrize("write", [write_megatron, write_raw_16, write_raw_32, write_npy, write_olmo])
def test_every_format_gives_the_same_documents(tmp_path, write):
    (tmp_path / "ids").mkdir()
    plan = open_rows(config_of(tmp_path, write(tmp_path / "ids")), "train")
    ends = [*plan.tokens.starts[1:], len(plan.tokens.ids)]
    found = [plan.tokens.ids[a:b].tolist() for a, b in zip(plan.tokens.starts, ends, strict=True)]
    assert found == [[*document, END] for document in DOCUMENTS]
    assert read_rows(plan, range(plan.rows_per_epoch)).tokens.shape == (plan.rows_per_epoch, 4)


def test_nothing_is_copied_but_where_documents_begin(tmp_path):
    (tmp_path / "ids").mkdir()
    ids = np.random.default_rng(0).integers(0, 50, 100_000).astype(np.uint16)
    ids.tofile(tmp_path / "ids" / "a.u16")
    open_rows(config_of(tmp_path, {"end_of_document": 7}), "train")
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").glob("starts-*/*"))
    assert kept < 8 * (ids == 7).sum() + 200


def test_without_an_end_of_document_a_file_is_a_document(tmp_path):
    (tmp_path / "ids").mkdir()
    raw(tmp_path / "ids", "uint16")
    assert len(open_rows(config_of(tmp_path, {"dtype": "uint16"}), "train").tokens.starts) == 2


def test_the_last_documents_are_kept_for_validation(tmp_path):
    (tmp_path / "ids").mkdir()
    config = config_of(tmp_path, write_npy(tmp_path / "ids"))
    config.data.validation, config.seq_len = 0.5, 2
    train, validation = open_rows(config, "train"), open_rows(config, "validation")
    assert [*train.tokens.ids[:], *validation.tokens.ids[:]] == [t for d in DOCUMENTS for t in [*d, END]]
    assert validation.tokens.starts.tolist() == [0, 5]


def test_prepared_data_are_a_source_with_their_tokenizer_and_splits(config, tmp_path):
    config.data.tokenizer, config.data.bpe_vocab = "bpe", 300
    folder = cache_of(config.data).folder
    folder.rename(tmp_path / "elsewhere")
    moved = DataConfig(
        target="stoker.data.token_files:open_source",
        path=str(tmp_path / "elsewhere"),
        tokenizer=None,
        cache=config.data.cache,
    )
    other = Config(data=moved, seq_len=16)
    assert (
        vocabulary(other) == 300
        and open_tokenizer(moved).fingerprint == open_folder(Path(moved.path)).meta["tokenizer"]
    )
    for split in ("train", "validation"):
        expected = open_rows(config, split)
        numbers = range(expected.rows_per_epoch)
        assert read_rows(open_rows(other, split), numbers).tokens.equal(read_rows(expected, numbers).tokens)


def test_files_that_are_known_are_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("stoker.data.documents._FRESH_SECONDS", -1.0)
    (tmp_path / "ids").mkdir()
    config = config_of(tmp_path, write_npy(tmp_path / "ids"))
    before = open_rows(config, "train").fingerprint
    monkeypatch.setattr("stoker.data.token_files._sampled", lambda path: pytest.fail(f"{path} was read"))
    assert open_rows(config, "train").fingerprint == before


def test_changed_tokens_are_another_source(tmp_path):
    (tmp_path / "ids").mkdir()
    config = config_of(tmp_path, write_npy(tmp_path / "ids"))
    before = open_rows(config, "train").fingerprint
    np.save(tmp_path / "ids" / "a.npy", np.array([1, 2, 3, 4, 5, END, 3], np.uint16))
    assert open_rows(config, "train").fingerprint["content"] != before["content"]


def cut_short(folder: Path) -> str:
    (folder / "a.u16").write_bytes(b"123")
    return r"a.u16 has 3 bytes of ids, no multiple of 2: it is cut short, or not of uint16"


def index_of_nothing(folder: Path) -> str:
    (folder / "a.bin").write_bytes(b"1234")
    (folder / "a.idx").write_bytes(b"no index at all" * 4)
    return "a.idx is no index of Megatron's: it does not begin as one"


def index_cut_short(folder: Path) -> str:
    megatron(folder / "a", DOCUMENTS)
    path = folder / "a.idx"
    path.write_bytes(path.read_bytes()[:-20])
    return "a.idx is no index of Megatron's: "


def index_of_more(folder: Path) -> str:
    megatron(folder / "a", DOCUMENTS)
    np.arange(4, dtype=np.uint16).tofile(folder / "a.bin")
    return r"a.idx lists sequence 1 of 2 tokens from byte 6 on, and a.bin has 8 bytes"


def two_dimensions(folder: Path) -> str:
    np.save(folder / "a.npy", np.zeros((2, 3), np.uint16))
    return r"a.npy holds uint16 of shape \(2, 3\), not a line of whole numbers"


def pickled(folder: Path) -> str:
    np.save(folder / "a.npy", np.array([{}], object), allow_pickle=True)
    return "a.npy is no NumPy array"


def too_large(folder: Path) -> str:
    ids = np.full(200_000, 299, np.uint16)
    ids[100_001] = 301
    ids.tofile(folder / "a.u16")
    return "a.u16, token 100001 is 301, but the vocabulary has 300: the tokens are of another tokenizer"


def no_files(folder: Path) -> str:
    (folder / "readme.txt").touch()
    return "holds no files that match"


@pytest.mark.parametrize(
    "spoil",
    [cut_short, index_of_nothing, index_cut_short, index_of_more, two_dimensions, pickled, too_large, no_files],
)
def test_bad_token_files_are_one_clear_error(tmp_path, spoil):
    (tmp_path / "ids").mkdir()
    message = spoil(tmp_path / "ids")
    with pytest.raises(ValueError, match=message):
        prepare(config_of(tmp_path, {}))


def test_tokens_without_a_tokenizer_need_a_vocabulary(tmp_path):
    (tmp_path / "ids").mkdir()
    config = config_of(tmp_path, write_npy(tmp_path / "ids"))
    assert vocabulary(config) == 300
    config.model.vocab_size = None
    with pytest.raises(ValueError, match=r"set data.tokenizer=PATH, or at least model.vocab_size=N"):
        vocabulary(config)


def test_arrays_end_to_end_read_like_one():
    parts = [np.arange(5), np.empty(0, np.int64), np.arange(5, 6), np.arange(6, 20)]
    joined = Joined(parts)
    places = np.array([[0, 4, 5], [6, 19, 5]])
    assert len(joined) == 20 and joined[places].tolist() == places.tolist()
    assert joined[3:8].tolist() == [3, 4, 5, 6, 7] and joined[18:99].tolist() == [18, 19]
    view = View(joined, 4, 9)
    assert len(view) == 5 and view[1:].tolist() == [5, 6, 7, 8] and view[np.array([0, 4])].tolist() == [4, 8]
