"""Tar shards: read by blocks, and never a shorter epoch without a report."""

from __future__ import annotations

import io
import json
import os
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from stoker.conf.schema import BatchConfig, Config, DataConfig
from stoker.data.remote import Damaged, refuse
from stoker.data.remote.store import Store
from stoker.data.streaming.opening import open_sources
from stoker.data.streaming.shuffle_windows import Window
from stoker.data.streaming.tar import Broken, Reader, samples
from stoker.data.streaming.tar_index import build_index, dump, load
from stoker.data.streaming.webdataset import open_webdataset
from stoker.data.tokenizer import ByteTokenizer
from tests.data.streaming.conftest import documents, open_stream
from tests.data.streaming.simulated import batches, digests

TEXTS = documents(120)


def archive(members: list[tuple[str, bytes]], **options) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def shard(numbers: range, **options) -> bytes:
    members = []
    for n in numbers:
        members += [(f"{n:05}.txt", TEXTS[n].encode()), (f"{n:05}.json", json.dumps({"n": n}).encode())]
    return archive(members, **options)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Three shards of 40 samples, in splits of 8 KiB."""
    for n in range(3):
        (tmp_path / f"s-{n:02}.tar").write_bytes(shard(range(40 * n, 40 * n + 40)))
    data = DataConfig(
        target="stoker.data.streaming.sources:streamed_only",
        splits="stoker.data.streaming.webdataset:open_webdataset",
        name="tars",
        urls=[f"{tmp_path}/s-{{00..02}}.tar"],
        cache=str(tmp_path / "cache"),
        validation=0.0,
        mode="streaming",
        streams=4,
        shuffle_window=2,
        split_bytes=8192,
        assign_every=2,
        epochs=1,
    )
    return Config(data=data, seq_len=64, batch=BatchConfig(size=8))


def read_all(config: Config) -> list[str]:
    splits = open_webdataset(config.data)
    return [content for split in range(len(splits)) for _, content in splits.read(split, Store(), refuse)]


def test_the_units_of_all_shards_hold_every_sample_once(config):
    splits = open_webdataset(config.data)
    assert len(splits) > 12
    assert read_all(config) == TEXTS


def test_an_index_beside_a_shard_or_in_the_cache_or_none_gives_the_same_rows(config, tmp_path):
    opener = partial(open_stream, config)
    first = digests(batches(opener, None, [{"dp": 2}]))
    assert len(list((tmp_path / "cache" / "indexes").iterdir())) == 3
    assert digests(batches(opener, None)) == first
    for path in tmp_path.glob("s-*.tar"):
        with open(path, "rb") as file:
            Path(f"{path}.index").write_bytes(dump(build_index(file), path.stat().st_size))
    for path in (tmp_path / "cache" / "indexes").iterdir():
        path.unlink()
    assert digests(batches(opener, None, [{"dp": 1, "batches": 5}, {"dp": 4}])) == first
    assert not list((tmp_path / "cache" / "indexes").iterdir())


def test_json_and_token_members_and_a_users_own_function(config, tmp_path):
    for n in range(3):
        members = []
        for k in range(5):
            ids = io.BytesIO()
            np.save(ids, np.arange(k, dtype=np.uint16))
            members += [(f"{n}/{k}.a.json", json.dumps({"text": f"{n}{k}", "x": ["é"]}).encode())]
            members += [(f"{n}/{k}.ids.npy", ids.getvalue())]
        (tmp_path / f"s-{n:02}.tar").write_bytes(archive(members))
    config.data.args["member"] = "a.json"
    assert read_all(config) == [f"{n}{k}" for n in range(3) for k in range(5)]
    config.data.args["member"] = "ids.npy"
    assert [ids.tolist() for ids in read_all(config)] == [list(range(k)) for _ in range(3) for k in range(5)]
    config.data.args["map"] = "tests.data.streaming.test_webdataset:keyed"
    assert read_all(config) == [f"{n}/{k}" for n in range(3) for k in range(5) if k != 3]


def keyed(sample: dict) -> str | None:
    assert json.loads(sample["a.json"])["x"] == ["é"]
    return None if sample["__key__"].endswith("3") else sample["__key__"]


def test_a_pipe_is_read_from_its_beginning_to_its_end(config, tmp_path):
    plain = read_all(config)
    config.data.urls = [f"pipe:cat {tmp_path}/s-{{00..02}}.tar"]
    assert read_all(config) == plain
    config.data.urls = [f"pipe:cat {tmp_path}/s-00.tar; exit 3"]
    with pytest.raises(Damaged, match="the command ended with status 3"):
        read_all(config)
    config.data.urls = [f"pipe:head -c 20000 {tmp_path}/s-00.tar"]
    with pytest.raises(Damaged, match=r"at byte 20000.* the archive was cut short"):
        read_all(config)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_every_length_and_format_are_read_as_tarfile_reads_them(format):
    names = [
        f"{'a' * k}/{'é' * (k // 2)}{k}.txt" for k in (1, 40, 90) + ((160,) if format != tarfile.USTAR_FORMAT else ())
    ]
    data = archive([(name, name.encode()) for name in names], format=format)
    found = [(member.name, member.content) for member in Reader(io.BytesIO(data)).members()]
    assert found == [(name, name.encode()) for name in names]


def first_of(config: Config) -> Path:
    return Path(config.data.urls[0].replace("{00..02}", "00"))


def headers(data: bytes) -> list[int]:
    return [member.header for member in Reader(io.BytesIO(data)).members()]


def cut_between_samples(data: bytes) -> tuple[bytes, str, int]:
    return data[: headers(data)[60]], "it ends without its end marker", 30


def cut_between_siblings(data: bytes) -> tuple[bytes, str, int]:
    return data[: headers(data)[61]], "the last sample lacks files", 30


def cut_inside_a_member(data: bytes) -> tuple[bytes, str, int]:
    long = max(range(0, 80, 2), key=lambda k: len(TEXTS[k // 2]))
    return data[: headers(data)[long] + 700], "it ends inside a member", long // 2


def cut_inside_a_header(data: bytes) -> tuple[bytes, str, int]:
    return data[: headers(data)[60] + 100], "it ends inside a header of 100 bytes", 30


def garbage_header(data: bytes) -> tuple[bytes, str, int]:
    at = headers(data)[60]
    return data[:at] + b"\xa5" * 512 + data[at + 512 :], "garbage where a header should be", 30


def one_zero_block(data: bytes) -> tuple[bytes, str, int]:
    at = headers(data)[60]
    return data[:at] + bytes(512) + data[at:], "one block of zeros", 30


DAMAGES = [
    cut_between_samples, cut_between_siblings, cut_inside_a_member, cut_inside_a_header, garbage_header, one_zero_block
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_archive_is_an_error_that_names_it_or_a_skip_that_is_recorded(config, damage):
    path = first_of(config)
    data, words, kept = damage(path.read_bytes())
    path.write_bytes(data)
    with pytest.raises(Damaged) as error:
        read_all(config)
    assert words in str(error.value) and str(path) in str(error.value) and error.value.byte is not None
    config.data.on_damage = "skip"
    found = skipped(config)
    assert sorted(found) == sorted([*TEXTS[:kept], *TEXTS[40:]])


def skipped(config: Config) -> list[str]:
    """The documents of all windows; missing ones must be those of the skips."""
    windows = open_sources(config, ByteTokenizer())[0][0]
    texts, lost = [], 0
    for number in range(windows.per_epoch):
        window = windows.read(number, Store())
        texts += texts_of(window)
        again = windows.read(number, Store(), window.skips)
        assert again.ids.tolist() == window.ids.tolist()
        lost += len(window.skips)
    assert lost > 0
    return texts


def texts_of(window: Window) -> list[str]:
    ends = [*window.starts[1:].tolist(), len(window.ids)][: len(window.starts)]
    return [bytes(window.ids[a : b - 1].tolist()).decode() for a, b in zip(window.starts.tolist(), ends, strict=True)]


def test_a_flipped_bit_is_found_by_the_checksum_of_the_index(config):
    read_all(config)  # builds the indexes
    path = first_of(config)
    status, data = path.stat(), bytearray(path.read_bytes())
    at = headers(bytes(data))[20] + 515
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # a disk that errs changes no time stamp
    with pytest.raises(Damaged, match=r"sample 00010.* its checksum differs from .*\.index: remove that if the shard"):
        read_all(config)
    path.touch()
    assert len(read_all(config)) == len(TEXTS)


def test_a_sample_without_the_wanted_member_or_with_bytes_that_are_no_text_is_named(config, tmp_path):
    path = first_of(config)
    path.write_bytes(archive([("a.txt", b"fine"), ("b.json", b"{}"), ("c.txt", b"\xff\xfe"), ("d.txt", b"fine too")]))
    with pytest.raises(Damaged, match=r"s-00.tar at byte 1024, sample b: no member .txt: it has .json"):
        read_all(config)
    config.data.urls, config.data.on_damage = [str(path)], "skip"
    windows = open_sources(config, ByteTokenizer())[0][0]
    window = windows.read(0, Store())
    assert [tuple(skip) for skip in window.skips] == [(0, 0, 1, 1), (0, 0, 2, 1)]
    assert len(window.starts) == 2


def test_an_empty_archive_holds_nothing_and_an_empty_file_is_damaged(config):
    path = first_of(config)
    path.write_bytes(archive([]))
    assert read_all(config) == TEXTS[40:]
    path.write_bytes(b"")
    with pytest.raises(Damaged, match="at byte 0: it ends without its end marker: the archive was cut short"):
        read_all(config)


def test_an_index_of_another_archive_is_not_used():
    data = shard(range(3))
    index = build_index(io.BytesIO(data))
    assert load(dump(index, len(data)), len(data)) == index
    assert load(dump(index, len(data)), len(data) + 512) is None
    assert load(b"[]", 3) is load(b"\xff", 3) is None


def test_samples_are_given_until_the_archive_breaks():
    data, _, _ = garbage_header(shard(range(40)))
    found = samples(Reader(io.BytesIO(data)))
    assert [next(found).sample.key for _ in range(30)] == [f"{n:05}" for n in range(30)]
    with pytest.raises(Broken, match="garbage where a header should be"):
        next(found)
