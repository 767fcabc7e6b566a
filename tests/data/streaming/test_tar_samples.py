"""Samples are what webdataset makes of an archive, or the archive is refused with file and member: nothing is lost."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import shlex
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from stoker.conf.compose import compose
from stoker.conf.schema import DataConfig
from stoker.data.remote import Damaged
from stoker.data.remote.store import Store
from stoker.data.streaming.opening import open_sources
from stoker.data.streaming.tar import Broken, Reader, samples
from stoker.data.tokenizer import ByteTokenizer
from stoker.launch.cli import main
from stoker.trainer.failure import in_one_line
from tests.data.streaming.archives import END, Entry, archive, files, read

DOCUMENTS = [(f"{n:04}.txt", f"document {n}") for n in range(3)]
TEXTS = [text for _, text in DOCUMENTS]


def config_of(folder: Path, data: bytes | None = None, **args: Any) -> DataConfig:
    """The shard s.tar of `folder`, written if `data` are given, in blocks of 1 KiB."""
    if data is not None:
        (folder / "s.tar").write_bytes(data)
    return DataConfig(
        target="stoker.data.streaming.sources:streamed_only",
        splits="stoker.data.streaming.webdataset:open_webdataset",
        name="tars",
        urls=f"{folder}/s.tar",
        cache=f"{folder}/cache",
        validation=0.0,
        mode="streaming",
        streams=1,
        shuffle_window=1,
        split_bytes=1024,
        epochs=1,
        args=args,
    )


def told(sample: dict[str, Any]) -> str:
    """A whole sample as a document: its key, and every member in order."""
    members = [(name, value) for name, value in sample.items() if not name.startswith("__") or name == "__local_path__"]
    return repr((sample["__key__"], members))


def by_webdataset(data: bytes) -> list[str] | Exception:
    try:
        stream = tar_file_expander([{"url": "s.tar", "stream": io.BytesIO(data)}])
        return [told(sample) for sample in group_by_keys(stream)]
    except Exception as error:
        return error


REGULAR = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE]
PASSED_OVER = [
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, b"V", "sparse"
]  # fmt: skip
KEYS = ["a", "b", "d/a", "./b", "v1.2/c", "é", "n" * 130, "m/" + "ö" * 90, "."]
NAMES = st.one_of(
    st.tuples(st.sampled_from(KEYS), st.sampled_from(["txt", "TXT", "json", "x.txt", ""])).map(".".join),
    st.sampled_from(["README", ".DS_Store", "__meta__", "__x__/a.txt", "./._a.txt", "m/._a.txt", "a", "a.__key__"]),
)
ENTRIES = st.builds(
    Entry, NAMES, st.binary(max_size=600), st.sampled_from(REGULAR * 4 + [tarfile.DIRTYPE, *PASSED_OVER])
)
FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
# What is done to a whole archive: nothing, filled up, cut, joined, a lone block of zeros, a garbled byte.
AFTER = st.sampled_from(["", "", "", "fill", "no end", "cut", "join", "zeros", "garble"])


def spoilt(data: bytes, how: str, place: float) -> bytes:
    at = int(place * len(data))
    if how == "fill":
        return data + bytes(3000)
    if how == "no end":
        return data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512)
    if how == "cut":
        return data[:at]
    if how == "join":
        return data + archive([Entry("z.txt", b"joined")])
    if how == "zeros":
        return data[: at // 512 * 512] + bytes(512) + data[at // 512 * 512 :]
    if how == "garble":
        return data[:at] + b"\xa5" + data[at + 1 :]
    return data


@settings(max_examples=250)
@given(st.lists(ENTRIES, max_size=8), FORMATS, AFTER, st.floats(0, 0.999))
@example(files(*DOCUMENTS, ("0002.txt", "appended")), tarfile.GNU_FORMAT, "", 0.0)
@example(files(*DOCUMENTS), tarfile.GNU_FORMAT, "join", 0.0)
@example([Entry("a.txt", b"x"), Entry("a.json", b"y", tarfile.LNKTYPE)], tarfile.GNU_FORMAT, "", 0.0)
def test_generated_archives_give_webdatasets_samples_or_are_refused(entries, format, after, place):
    whole = archive(entries, format)
    data = spoilt(whole, after, place)
    theirs = by_webdataset(data if after == "garble" else whole)  # which ends early without an error where data are cut
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), data, map=f"{__name__}:told")
        try:
            ours, leftovers = read(config)
        except Damaged as error:
            said = str(error)
        else:
            said = ""
    if said:
        clean = not after and all(entry.kind in (*REGULAR, tarfile.DIRTYPE) for entry in entries)
        assert f"{folder}/s.tar" in said and (not clean or isinstance(theirs, ValueError)), "refused for nothing"
        return
    assert ours == theirs and after not in ("no end", "join")
    made = [name for sample in ours for name in eval(sample)[1]]
    assert len(made) + len(leftovers) == sum(entry.kind != tarfile.DIRTYPE for entry in entries)  # all accounted for


def refused(config: DataConfig) -> str:
    with pytest.raises(Damaged) as error:
        read(config)
    return str(error.value)


def test_names_that_occur_twice_in_a_sample_are_refused_and_not_the_last_one_taken(tmp_path):
    same = archive(files(*[("doc.txt", text) for text in TEXTS]))
    words = f"{tmp_path}/s.tar at byte 0, sample doc: member doc.txt at byte 1024: a second one of its name"
    assert words in refused(config_of(tmp_path, same))
    appended = archive(files(*DOCUMENTS, ("0002.txt", "a newer one")))
    config = config_of(tmp_path, appended)
    assert "at byte 2048, sample 0002: member 0002.txt at byte 3072" in refused(config)
    config.on_damage = "skip"
    windows = open_sources(compose_over(config), ByteTokenizer())[0][0]
    found = [windows.read(number, Store()) for number in range(windows.per_epoch)]
    assert sum(len(window.starts) for window in found) == 2
    assert sum(len(window.skips) for window in found) == 1


def compose_over(data: DataConfig):
    config = compose([])
    config.data = data
    return config


def test_files_that_are_no_samples_are_left_out_as_webdataset_does_and_counted(tmp_path):
    mac = [
        Entry(name, content)
        for n in range(3)
        for name, content in [
            (f"./._{n:04}.json", b"\0\5\x16\7mac"),
            (f"./{n:04}.json", b"{}"),
            (f"./._{n:04}.txt", b"\0\5\x16\7mac"),
            (f"./{n:04}.txt", TEXTS[n].encode()),
        ]
    ]
    documents, leftovers = read(config_of(tmp_path, archive(mac)))
    assert documents == TEXTS and [leftover.name for leftover in leftovers] == [e.name for e in mac[::2]]
    others = files(("README", "about"), (".DS_Store", "\0"), ("__meta__", "x"), ("__doc__/a.txt", "x"), *DOCUMENTS)
    config = config_of(tmp_path, archive(others))
    documents, leftovers = read(config)
    assert documents == TEXTS and [leftover.name for leftover in leftovers] == [e.name for e in others[:4]]
    assert str(leftovers[0]) == f"{tmp_path}/s.tar at byte 0, README: a name without an extension"
    windows = open_sources(compose_over(config), ByteTokenizer())[0][0]
    assert sum(windows.read(number, Store()).leftovers for number in range(windows.per_epoch)) == 4


@pytest.mark.parametrize(
    "entries",
    [
        [*files(("README", "about"), *DOCUMENTS), Entry("0002.jpg", b"", tarfile.SYMTYPE)],
        files(*DOCUMENTS, ("0002.txt", "a newer one")),
        [*files(*DOCUMENTS), Entry("0003.txt", b"", tarfile.LNKTYPE)],
    ],
)
def test_what_comes_through_a_pipe_is_accounted_for_alike(tmp_path, entries):
    def outcome(urls: str) -> Any:
        config.urls = urls
        try:
            documents, leftovers = read(config)
        except Damaged as error:
            return error.byte, error.reason
        return documents, [(leftover.byte, leftover.name) for leftover in leftovers]

    config = config_of(tmp_path, archive(entries))
    assert outcome(f"pipe:cat {tmp_path}/s.tar") == outcome(f"{tmp_path}/s.tar")


def test_verify_counts_and_names_what_is_left_out(tmp_path, capsys):
    config_of(tmp_path, archive(files(("README", "about"), *DOCUMENTS)))
    words = ["data=webdataset", f"data.urls={tmp_path}/s.tar", f"data.cache={tmp_path}/cache"]
    assert main(["data", "verify", *words]) == 0
    shown = capsys.readouterr().out
    assert "3 documents" in shown and "1 left out" in shown
    assert f"{tmp_path}/s.tar at byte 0, README: a name without an extension" in shown
    config_of(tmp_path, archive(files(*DOCUMENTS, ("0002.txt", "a newer one"), ("README", "about"))))
    assert main(["data", "verify", *words]) == 1
    assert "sample 0002: member 0002.txt at byte 3072: a second one" in capsys.readouterr().out


def test_extensions_are_lowered_as_webdataset_does(tmp_path):
    config = config_of(tmp_path, archive(files(*[(name.upper(), text) for name, text in DOCUMENTS])))
    assert read(config)[0] == TEXTS
    config.args["member"] = "TXT"
    with pytest.raises(ValueError, match=r"data.args.member=TXT: webdataset lowers extensions: txt finds it"):
        read(config)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, "sparse"])
def test_a_linked_document_is_refused_and_an_unused_member_is_only_counted(tmp_path, kind):
    data = archive([*files(*DOCUMENTS), Entry("0003.txt", b"x", kind)])
    assert f"{tmp_path}/s.tar at byte 3072, sample 0003.txt: 0003.txt is " in refused(config_of(tmp_path, data))
    documents, leftovers = read(config_of(tmp_path, archive([*files(*DOCUMENTS), Entry("0002.jpg", b"x", kind)])))
    assert documents == TEXTS and [leftover.name for leftover in leftovers] == ["0002.jpg"]


def test_bytes_behind_the_end_are_refused_unless_they_are_zeros(tmp_path):
    data = archive(files(*DOCUMENTS))
    assert read(config_of(tmp_path, data + bytes(100_000))) == (TEXTS, [])
    at = len(data)
    assert f"s.tar at byte {at}, sample after 0002: bytes after the end" in refused(config_of(tmp_path, data + data))


def test_a_global_header_that_names_all_members_is_refused_and_a_comment_is_not(tmp_path):
    data = archive(files(*DOCUMENTS), tarfile.PAX_FORMAT, {"comment": "made by git"})
    assert read(config_of(tmp_path, data)) == (TEXTS, [])
    data = archive(files(*DOCUMENTS), tarfile.PAX_FORMAT, {"path": "same.txt"})
    assert "a global header that sets path of all members after it" in refused(config_of(tmp_path, data))


PACKERS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstandard.compress}


@pytest.mark.parametrize("name", PACKERS)
def test_a_compressed_shard_is_named_and_the_advice_works(tmp_path, name):
    packed = PACKERS[name](archive(files(*DOCUMENTS)))
    config = config_of(tmp_path, packed)
    with pytest.raises(ValueError, match="it is compressed") as error:
        read(config)
    assert not isinstance(error.value, Damaged)  # data.on_damage=skip must not pass over it
    advice = re.search(r"data\.urls=pipe:.*$", in_one_line(error.value))  # as a user reads it
    assert advice is not None and advice.group().startswith(f"data.urls=pipe:{name} -dc ")
    if name == "gzip":  # what is on every machine
        config.urls = compose(shlex.split(shlex.quote(advice.group()))).data.urls
        assert read(config) == (TEXTS, [])
        config.urls = f"pipe:cat {tmp_path}/s.tar"
        with pytest.raises(ValueError, match=r"it is compressed: .*: add \| gzip -dc to the command"):
            read(config)


def test_members_are_decoded_by_webdataset(tmp_path):
    ids = io.BytesIO()
    np.save(ids, np.arange(5, dtype=np.uint16))
    data = archive(
        [
            Entry("a.txt.gz", gzip.compress(b"zipped")),
            Entry("a.transcript", b"spoken"),
            Entry("a.md", b"# unknown to it"),
            Entry("a.jsn", json.dumps({"text": "in JSON"}).encode()),
            Entry("a.ids.npy", ids.getvalue()),
        ]
    )
    for member, expected in [
        ("txt.gz", "zipped"), ("transcript", "spoken"), ("md", "# unknown to it"), ("jsn", "in JSON")
    ]:  # fmt: skip
        assert read(config_of(tmp_path, data, member=member))[0] == [expected]
    assert read(config_of(tmp_path, data, member="ids.npy"))[0][0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("member", ["pkl", "x.pickle", "pyd", "pth", "cls", "npz", "ten", "pyd.gz"])
def test_members_that_are_no_documents_or_run_code_are_refused(tmp_path, member):
    with pytest.raises(ValueError, match=rf"data.args.member={member}: .* is neither text nor token ids"):
        read(config_of(tmp_path, archive([]), member=member))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


BAD_MEMBERS = {
    "null.json": (b"null", "'.json' is NoneType"),
    "list.json": (b'{"text": ["a"]}', "neither text nor token ids"),
    "deep.json": (b"[" * 100_000, "cannot be read: maximum recursion depth"),
    "bare.txt": (b"\xff", "not UTF-8: byte 0xff at offset 0"),
    "cut.txt.gz": (gzip.compress(b"x" * 100)[:-9], "cannot be read"),
    "more.npy": (npy(np.arange(4)) + b"more", "4 bytes follow the array"),
    "less.npy": (npy(np.arange(4))[:-1], "it is cut short"),
    "objects.npy": (npy(np.array([{}], object)), "Python objects, which are never unpickled"),
    "table.npy": (npy(np.zeros((2, 2), int)), "neither text nor token ids"),
    "huge.npy": (npy(np.arange(4)).replace(b"(4,), }", b"(4" + b"0" * 12 + b",), }"), "its header ends the array at"),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_a_member_that_cannot_be_read_whole_is_named(tmp_path, name):
    content, words = BAD_MEMBERS[name]
    said = refused(config_of(tmp_path, archive([Entry(name, content)]), member=name.partition(".")[2]))
    assert said.startswith(f"{tmp_path}/s.tar at byte 0, sample {name.partition('.')[0]}: ") and words in said


def garbled(name: str, kind: bytes, size: int, content: bytes) -> bytes:
    """A header of `kind` that claims `size` bytes, and `content`."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + content


HOSTILE = {
    "more than 262144 bytes": garbled("x", tarfile.GNUTYPE_LONGNAME, 8 << 30, b"x" * 2048),
    "headers of more than 262144": garbled("x", tarfile.XHDTYPE, 1 << 20, b"a" * (1 << 20)),
    "more than 512 digits": garbled("x", tarfile.XHDTYPE, 200 << 10, b"1" * (200 << 10)),
    "garbage where a header": garbled("x", tarfile.GNUTYPE_LONGNAME, 0, b"") * 5000,
    "a sample has 1073741824 at most": garbled("x.txt", tarfile.REGTYPE, 2 << 30, b"x" * 2048),
    "contradict each other": garbled("x.txt", tarfile.REGTYPE, -1024, b"x" * 2048),
}


@pytest.mark.parametrize("words", HOSTILE)
def test_a_header_cannot_make_the_reader_busy_or_large(words):
    began = time.process_time()
    with pytest.raises(Broken, match=words) as error:
        list(samples(Reader(io.BytesIO(HOSTILE[words] + END))))
    assert error.value.byte == 0 and time.process_time() - began < 5


def test_a_name_with_control_characters_is_spelt_out(tmp_path):
    said = refused(config_of(tmp_path, archive([Entry("\x1b[2J\udcff.json", b"{}")])))
    assert "sample \\x1b[2J\\udcff: no member .txt: it has .json" in said
