"""Token files are read as their owners read them, or refused with file and place: no width is guessed, no id lost."""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stoker.conf.migrations import migrate
from stoker.conf.schema import DataConfig
from stoker.data.megatron import open_indexed
from stoker.data.token_files import open_source
from stoker.data.tokens import Tokens

CODES = {1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def config_of(folder: Path, **args: Any) -> DataConfig:
    path, cache = str(folder / "ids"), str(folder / "cache")
    return DataConfig(target="stoker.data.token_files:open_source", path=path, cache=cache, args=args)


def documents(tokens: Tokens) -> list[list[int]]:
    ends = [*tokens.starts[1:].tolist(), len(tokens.ids)][: len(tokens.starts)]
    return [tokens.ids[a:b].tolist() for a, b in zip(tokens.starts.tolist(), ends, strict=True)]


def read(folder: Path, **args: Any) -> list[list[int]]:
    found = open_source(config_of(folder, **args))
    assert found.whole is not None
    return documents(found.whole)


def written(folder: Path, name: str, content: bytes) -> None:
    (folder / "ids").mkdir(exist_ok=True)
    (folder / "ids" / name).write_bytes(content)


def index(
    code: int, sizes: Sequence[int], pointers: Sequence[int], firsts: Sequence[int], version: int = 1, more: bytes = b""
) -> bytes:
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, code, len(sizes), len(firsts))
    arrays = (np.array(sizes, "<i4"), np.array(pointers, "<i8"), np.array(firsts, "<i8"))
    return head + b"".join(array.tobytes() for array in arrays) + more


def by_format(bin_: bytes, idx: bytes) -> list[list[int]]:
    """The documents of an indexed dataset, number by number, as Megatron-LM's documentation lays the format out."""
    code, sequences, count = struct.unpack_from("<BQQ", idx, 17)
    at = 34
    sizes = struct.unpack_from(f"<{sequences}i", idx, at)
    pointers = struct.unpack_from(f"<{sequences}q", idx, at + 4 * sequences)
    firsts = struct.unpack_from(f"<{count}q", idx, at + 12 * sequences)
    held = [np.frombuffer(bin_, CODES[code], size, place).tolist() for size, place in zip(sizes, pointers, strict=True)]
    found = [[*chain(*held[a:b])] for a, b in pairwise(firsts)]
    return [document for document in found if document]


@st.composite
def indexed(draw: Callable) -> tuple[bytes, bytes]:
    """A .bin and its .idx: sequences in order, in another, twice, overlapping, or not at all; documents of several."""
    code = draw(st.sampled_from(sorted(CODES)))
    item = np.dtype(CODES[code]).itemsize
    ids = np.array(draw(st.lists(st.integers(0, 127), min_size=1, max_size=60)), CODES[code])
    spans = st.tuples(st.integers(0, len(ids)), st.integers(0, len(ids))).map(sorted)
    if draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
        lying = [list(span) for span in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
        lying = draw(st.permutations(lying)) if draw(st.booleans()) else lying
    else:
        lying = [*draw(st.lists(spans, max_size=6)), [draw(st.integers(0, len(ids))), len(ids)]]
    inner = draw(st.lists(st.integers(0, len(lying)), max_size=5))
    firsts = [0, *sorted(inner), len(lying)]
    modes = bytes(len(lying)) if draw(st.booleans()) else b""
    return ids.tobytes(), index(code, [b - a for a, b in lying], [a * item for a, _ in lying], firsts, more=modes)


SWAPPED = (b"\1\2\3\4", index(1, [2, 2], [2, 0], [0, 1, 2]))


@settings(max_examples=150)
@given(indexed())
@example(SWAPPED)
def test_indexed_datasets_have_the_documents_of_their_format(files):
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder), "d.bin", files[0])
        written(Path(folder), "d.idx", files[1])
        found = open_indexed(Path(folder, "ids", "d.bin"), Path(folder, "ids", "d.idx"))
    assert documents(Tokens(*found)) == by_format(*files)


def test_pointers_decide_the_position_of_a_sequence(tmp_path):
    sizes = [20 + n for n in range(6)]
    begins = np.cumsum([0, *sizes[:0:-1]])[::-1] * 2  # the last sequence comes first
    ids = np.concatenate([np.full(20 + n, n + 1, "<u2") for n in range(5, -1, -1)])
    written(tmp_path, "d.bin", ids.tobytes())
    written(tmp_path, "d.idx", index(8, sizes, begins.tolist(), range(7)))
    assert read(tmp_path) == [[n + 1] * (20 + n) for n in range(6)]


def test_tokens_in_no_sequence_are_logged(tmp_path, caplog):
    written(tmp_path, "d.bin", np.arange(10, dtype="<u2").tobytes())
    written(tmp_path, "d.idx", index(8, [2, 4], [0, 12], [0, 1, 2]))
    assert read(tmp_path) == [[0, 1], [6, 7, 8, 9]]
    assert "d.bin: 4 of its 10 tokens are in no sequence of d.idx" in caplog.text


GOOD = (8, [2, 3], [0, 4], [0, 1, 2])
BAD_INDEXES = {
    "bytes from byte 10 on come after every sequence of d.idx": (index(*GOOD), bytes(16)),
    "d.bin has 11 bytes, no multiple of 2": (index(*GOOD), bytes(11)),
    "lists sequence 1 of 3 tokens from byte 4 on, and d.bin has 8 bytes": (index(*GOOD), bytes(8)),
    "end at byte 82, and it has 81: it is cut short": (index(*GOOD)[:-1], bytes(10)),
    "end at byte 82, and it has 83: 1 bytes follow": (index(*GOOD) + b"x", bytes(10)),
    "sequences of other modes than text": (index(*GOOD, more=b"\0\1"), bytes(10)),
    "version 2, dtype 8": (index(*GOOD, version=2), bytes(10)),
    "its dtype is float64": (index(6, *GOOD[1:]), bytes(40)),
    "do not rise from 0 to its 2 sequences": (index(8, [2, 3], [0, 4], [0, 2, 1]), bytes(10)),
    "the firsts of its documents do not rise": (index(8, [2, 3], [0, 4], [1, 2]), bytes(10)),
    "sequence 1 of 3 tokens from byte 3 on": (index(8, [2, 3], [0, 3], [0, 1, 2]), bytes(10)),
    "sequence 0 of -2 tokens": (index(8, [-2, 3], [0, 4], [0, 1, 2]), bytes(10)),
    "one of its old kind": (b"TNTIDX\x00\x00" + bytes(60), bytes(10)),
    "it does not begin as one": (b"", bytes(10)),
    "4611686018427387904 sequences": (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 1 << 62, 1 << 62), bytes(10)),
}


@pytest.mark.parametrize("words", BAD_INDEXES)
def test_an_index_that_does_not_fit_its_ids_is_refused(tmp_path, words):
    written(tmp_path, "d.idx", BAD_INDEXES[words][0])
    written(tmp_path, "d.bin", BAD_INDEXES[words][1])
    with pytest.raises(ValueError, match=f"^{tmp_path}/ids/.*{words}"):
        read(tmp_path)


def test_an_index_without_its_ids_is_no_empty_file(tmp_path):
    written(tmp_path, "a.npy", npy(np.arange(4)))
    written(tmp_path, "d.idx", index(*GOOD))
    with pytest.raises(ValueError, match=r"d.idx has no ids: d.bin is missing beside it"):
        read(tmp_path)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def llm_c(ids: np.ndarray, magic: int = 20240520, version: int = 1, more: bytes = b"") -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    return header.tobytes() + ids.tobytes() + more


ARRAYS = st.sampled_from(["u1", "<u2", ">u2", "<i4", ">i4", "<u4", "<i8", "<u8"]).flatmap(
    lambda dtype: st.lists(st.integers(0, 255), max_size=80).map(lambda ids: np.array(ids, dtype))
)


@settings(max_examples=60)
@given(ARRAYS, st.one_of(st.none(), st.integers(0, 255)), st.sampled_from(["npy", "raw", "llm.c"]))
def test_arrays_give_the_documents_that_numpy_reads(ids, end, kind):
    args = {}
    if kind == "npy":
        name, content = "a.npy", npy(ids)
    elif kind == "raw":
        ids = ids.astype(ids.dtype.newbyteorder("<"))
        name, content, args = "a.bin", ids.tobytes(), {"dtype": ids.dtype.name}
    else:
        wide = ids.itemsize > 2
        ids = ids.astype("<u4" if wide else "<u2")
        name, content = "a.bin", llm_c(ids, 20240801, 7) if wide else llm_c(ids)
    cuts = [] if end is None else np.flatnonzero(ids == end) + 1
    expected = [part.tolist() for part in np.split(ids, cuts) if len(part)]
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder), name, content)
        if kind == "raw" and len(ids) >= 64 and ids.any() and not ids[1::2].any():
            with pytest.raises(ValueError, match="every second id is 0"):
                read(Path(folder), end_of_document=end, **args)
        else:
            assert read(Path(folder), end_of_document=end, **args) == expected


IDS = np.tile(np.arange(1, 60), 10)


def test_ids_of_four_bytes_are_never_taken_for_two(tmp_path):
    written(tmp_path, "train.bin", IDS.astype("<i4").tobytes())
    with pytest.raises(
        ValueError, match=r"train.bin has no known header.* set data.args.dtype=uint16 .* needs its train.idx"
    ):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"train.bin: read as uint16, every second id is 0, .* such as uint32"):
        read(tmp_path, dtype="uint16")
    assert read(tmp_path, dtype="uint32") == [IDS.tolist()]


def test_a_name_that_states_a_width_sets_it(tmp_path):
    written(tmp_path, "a.u32", IDS.astype("<u4").tobytes())
    assert read(tmp_path) == [IDS.tolist()]
    with pytest.raises(ValueError, match=r"a.u32: data.args.dtype=uint16, but its name means uint32"):
        read(tmp_path, dtype="uint16")


BAD_FILES = {
    "a.bin has a header for 590 tokens, and 591 follow it": llm_c(IDS.astype("<u2"), more=b"xx"),
    "a.bin has 1179 bytes of ids, no multiple of 2": llm_c(IDS.astype("<u2"))[:-1],
    "a.bin has llm.c's header 20240520 of version 2": llm_c(IDS.astype("<u2"), version=2),
    "a.bin is no NumPy array: its header ends the array at byte 4848, and it has 4847 bytes: it is cut": npy(IDS)[:-1],
    "a.bin is no NumPy array: .* 3 bytes follow the array": npy(IDS) + b"xxx",
    "a.bin holds float64 of shape .590,., not a line": npy(IDS.astype(float)),
    "a.bin is no NumPy array: it holds Python objects": npy(np.array([{}], object)),
    "a.bin is no NumPy array: its header is garbled or cut short": npy(IDS)[:40],
    "a.bin is no NumPy array: version 9.0": b"\x93NUMPY\x09\x00" + npy(IDS)[8:],
    "a.bin is no NumPy array: its header is garbled .* large": b"\x93NUMPY\x02\x00\xff\xff\x0f\x00" + b"(" * 0xFFFFF,
    "a.bin, token 301 is -1: ids are not negative": npy(np.where(np.arange(590) == 301, -1, IDS)),
}


@pytest.mark.parametrize("words", BAD_FILES)
def test_a_file_that_contradicts_its_header_is_refused(tmp_path, words):
    written(tmp_path, "a.bin", BAD_FILES[words])
    with pytest.raises(ValueError, match=f"{tmp_path}/ids/{words}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"format": "numpy"}, "data.args.format=numpy: choose from auto, stoker, megatron, npy, llm.c, raw"),
        ({"dtype": "float32"}, "data.args.dtype=float32: choose from uint8"),
        ({"end_of_document": "eos"}, "data.args.end_of_document=eos: must be the id of a token"),
        ({"format": "raw"}, "a.bin is not a file of data.args.format=raw: it begins like one of format=llm.c"),
        ({"format": "megatron"}, "a.bin has no index: .*a.idx does not exist"),
    ],
)
def test_what_is_stated_must_be_known_and_fit(tmp_path, args, words):
    written(tmp_path, "a.bin", llm_c(IDS.astype("<u2")))
    with pytest.raises(ValueError, match=words):
        read(tmp_path, **args)


def test_ids_beyond_the_vocabulary_are_found_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("stoker.data.token_files._BLOCK", 1 << 10)
    ids = np.tile(IDS, 400)
    ids[100_001] = 900
    written(tmp_path, "x.npy", npy(ids.astype("<u2")))
    found = open_source(config_of(tmp_path))
    found.refuse_vocabulary(901)
    with pytest.raises(ValueError, match=r"x.npy, token 100001 is 900, but the vocabulary has 900"):
        found.refuse_vocabulary(900)
    with pytest.raises(ValueError, match=r"x.npy holds uint16, .* more than 65536 ids, .* has 128256"):
        found.refuse_vocabulary(128_256)


def test_a_run_of_before_widths_were_stated_keeps_the_one_it_had():
    old = {"data": {"target": "data.token_files:open_source", "args": {"end_of_document": 1}}}
    moved = migrate(old)["data"]
    assert moved["args"] == {"end_of_document": 1, "dtype": "uint16"}
    assert migrate({"data": moved})["data"] == moved
    mixed = {"data": {"target": "data.stdlib:open_source", "sources": {"a": {"kind": "tokens"}, "b": {"kind": "text"}}}}
    assert migrate(mixed)["data"]["sources"] == {
        "a": {"kind": "tokens", "args": {"dtype": "uint16"}},
        "b": {"kind": "text"},
    }
