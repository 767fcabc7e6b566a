from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from stoker.conf.schema import Config, DataConfig
from stoker.data import open_rows, prepare
from stoker.data.documents import Document, file_document, open_source
from stoker.data.tokenizer import ByteTokenizer
from tests.data.conftest import cache_of, write_text


def test_the_standard_library_is_the_default_and_holds_no_tests():
    documents = open_source(DataConfig())
    names = [document.name for document in documents]
    assert names == sorted(names) and len(set(names)) == len(names) > 300
    assert "ast.py" in names and "json/decoder.py" in names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert sum(len(document.read()) for document in documents) > 5_000_000


def test_the_standard_library_makes_rows(tmp_path):
    config = Config(data=DataConfig(cache=str(tmp_path)))
    config.eval.sequences = 32
    prepare(config)
    plan = open_rows(config, "train")
    assert plan.rows_per_epoch > 10_000
    first = ByteTokenizer().decode(plan.tokens.ids[: plan.tokens.starts[1]])
    assert first == (Path(os.__file__).parent / "__future__.py").read_text()


def test_the_standard_library_reads_no_path(config):
    config.data.target = "stoker.data.stdlib:open_source"
    with pytest.raises(ValueError, match=r"data=stdlib reads no data.path=.*: use data=text data.path="):
        prepare(config)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b.txt", "a/z.txt", "a.txt", ".hidden", ".git/config", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_text(tmp_path / name, name)
    config = DataConfig(target="stoker.data.text:open_source", path=str(tmp_path))
    assert [document.name for document in open_source(config)] == ["a.txt", "a/z.txt", "b.txt", "c.md"]
    config.args = {"pattern": "*.md"}
    assert [document.read() for document in open_source(config)] == ["c.md"]


def test_a_linked_folder_is_read(config, tmp_path):
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "link").symlink_to(config.data.path)
    config.data.path = str(tmp_path / "outer")
    assert len(open_source(config.data)) == 40


def test_one_file_is_one_document(config):
    config.data.path += "/text-001.txt"
    assert [document.name for document in open_source(config.data)] == ["text-001.txt"]


def test_stamps_give_a_version_only_once_a_second_write_would_change_them(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("one")
    assert file_document("text.txt", path).version is None
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3)
    version = file_document("text.txt", path).version
    assert version is not None
    path.write_text("two")
    monkeypatch.setattr(time, "time", lambda: now + 6)
    assert file_document("text.txt", path).version not in (None, version)


def missing(folder: Path) -> str:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return f"data.path={folder} does not exist"


def without_files(folder: Path) -> str:
    for path in folder.iterdir():
        path.unlink()
    return f"data.path={folder} holds no files that match data.args.pattern=\\*"


def without_text(folder: Path) -> str:
    for path in folder.iterdir():
        write_text(path, "")
    return r"none of the 40 documents \(first: text-000.txt\) holds any text"


def broken_link(folder: Path) -> str:
    (folder / "link.txt").symlink_to("nowhere")
    return f"cannot read {folder}/link.txt: No such file or directory"


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return f"cannot read {folder}/pipe: it is no regular file"


def latin1(folder: Path) -> str:
    write_text(folder / "text-005.txt", "caf\u00e9 au lait".encode("latin-1"))
    return f"{folder}/text-005.txt is not UTF-8 text: byte 0xe9 at offset 3"


def circle(folder: Path) -> str:
    (folder / "again").symlink_to(folder)
    return "cannot (read|list) .*Too many levels of symbolic links"


@pytest.mark.parametrize("spoil", [missing, without_files, without_text, broken_link, pipe, latin1, circle])
def test_bad_texts_are_one_clear_error(config, spoil):
    message = spoil(Path(config.data.path))
    with pytest.raises(ValueError, match=message):
        prepare(config)


@pytest.fixture
def nobody():
    """Without root's right to read everything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("what", ["a file", "a folder", "all"])
def test_what_may_not_be_read_is_named(config, tmp_path, what, request):
    folder = Path(config.data.path)
    (folder / "sub").mkdir()
    target = {"a file": folder / "text-009.txt", "a folder": folder / "sub", "all": folder}[what]
    for parent in [*tmp_path.parents[:3], tmp_path]:
        if parent.stat().st_uid == os.getuid():
            parent.chmod(0o755)
    os.makedirs(config.data.cache)
    os.chmod(config.data.cache, 0o777)
    target.chmod(0)
    request.getfixturevalue("nobody")
    with pytest.raises(ValueError, match=f"cannot (read|list) {target}: Permission denied"):
        prepare(config)


def open_two(config: DataConfig) -> list[Document]:
    return [Document("one", lambda: "first text"), Document("two", lambda: config.args["second"])]


def open_none(config: DataConfig) -> list[Document]:
    return []


def test_a_users_source_is_named_by_import_path(tmp_path):
    config = DataConfig(target=f"{__name__}:open_two", cache=str(tmp_path), validation=0.0, args={"second": "more"})
    tokens = cache_of(config).tokens("train")
    assert ByteTokenizer().decode(tokens.ids) == "first textmore"
    config.args = {"second": "less"}
    assert ByteTokenizer().decode(cache_of(config).tokens("train").ids) == "first textless"


@pytest.mark.parametrize(
    ("second", "message"),
    [(b"bytes", "document two reads as bytes, not as text"), ("\ud800", "document two is not valid Unicode")],
)
def test_a_users_document_that_is_no_text_is_named(tmp_path, second, message):
    config = DataConfig(target=f"{__name__}:open_two", cache=str(tmp_path), args={"second": second})
    with pytest.raises(ValueError, match=message):
        cache_of(config)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (f"{__name__}:open_none", "open_none returned no documents"),
        ("nowhere.at_all:open", "cannot import 'nowhere.at_all'"),
        (f"{__name__}:absent", "has no 'absent'"),
    ],
)
def test_a_source_that_is_none_is_named(tmp_path, target, message):
    with pytest.raises(ValueError, match=message):
        cache_of(DataConfig(target=target, cache=str(tmp_path)))
