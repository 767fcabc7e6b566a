from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from stoker.conf.schema import Config
from stoker.data import cache as cache_module
from stoker.data import open_rows, prepare
from stoker.data.cache import open_folder
from stoker.data.loader import IndexedLoader
from stoker.data.tokenizer import ByteTokenizer
from tests.data.conftest import cache_of, write_text, write_texts


def texts_of(config: Config, split: str) -> list[str]:
    tokens = cache_of(config.data).tokens(split)
    ends = [*tokens.starts[1:], len(tokens.ids)]
    assert all(tokens.ids[end - 1] == 256 for end in ends)
    return [ByteTokenizer().decode(tokens.ids[a : b - 1]) for a, b in zip(tokens.starts, ends, strict=True)]


@pytest.fixture
def builds(monkeypatch):
    """How often tokens were made."""
    made = []
    build = cache_module._build
    monkeypatch.setattr(cache_module, "_build", lambda *arguments: (made.append(1), build(*arguments)))
    return made


def test_every_document_is_there_once_in_order_and_no_text_on_both_sides(config):
    files = [path.read_text() for path in sorted(Path(config.data.path).iterdir())]
    train, validation = texts_of(config, "train"), texts_of(config, "validation")
    assert train == [text for text in files if text in train]
    assert validation == [text for text in files if text in validation]
    assert len(train) + len(validation) == len(files) and not set(train) & set(validation)
    assert 2 <= len(validation) <= 16


def test_copies_of_a_text_are_on_the_same_side_under_any_name(config):
    folder = Path(config.data.path)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy2(path, folder / f"copy-{40 - number}.md")
    train, validation = texts_of(config, "train"), texts_of(config, "validation")
    assert all(train.count(text) == 2 for text in train) and all(validation.count(text) == 2 for text in validation)


def test_a_document_without_text_leaves_no_trace(config):
    before = open_rows(config, "train").fingerprint
    write_text(Path(config.data.path) / "empty.txt", "")
    assert open_rows(config, "train").fingerprint == before


def test_tokens_are_made_once(config, builds):
    for _ in range(3):
        prepare(config)
    open_rows(config, "validation")
    assert len(builds) == 1


def test_a_ready_cache_is_opened_without_reading_a_text(config, monkeypatch):
    monkeypatch.setattr("stoker.data.documents._FRESH_SECONDS", -1.0)
    prepare(config)
    monkeypatch.setattr("stoker.data.documents._read", lambda path: pytest.fail(f"{path} was read"))
    assert open_rows(config, "train").rows_per_epoch > 0


@pytest.mark.parametrize("fresh_seconds", [2.0, -1.0], ids=["stamps too fresh to trust", "stamps trusted"])
def test_a_changed_text_is_noticed(config, monkeypatch, fresh_seconds):
    monkeypatch.setattr("stoker.data.documents._FRESH_SECONDS", fresh_seconds)
    before = open_rows(config, "train").fingerprint["content"]
    path = Path(config.data.path) / "text-007.txt"
    stamps = path.stat().st_mtime
    time.sleep(0.02)
    path.write_text(path.read_text().upper())  # as long as before
    os.utime(path, (stamps, stamps))
    assert open_rows(config, "train").fingerprint["content"] != before


def test_neither_places_nor_times_nor_names_are_part_of_the_fingerprint(config, tmp_path, builds):
    before = open_rows(config, "train").fingerprint
    shutil.copytree(config.data.path, tmp_path / "elsewhere")
    for path in list((tmp_path / "elsewhere").iterdir()):
        os.utime(path, (1, 1))
        path.rename(path.with_name(f"renamed-{path.name}"))
    config.data.path, config.data.name = str(tmp_path / "elsewhere"), "copy"
    assert open_rows(config, "train").fingerprint == before
    assert len(builds) == 1


def remove_meta(folder: Path) -> None:
    (folder / "meta.json").unlink()


def spoil_meta(folder: Path) -> None:
    (folder / "meta.json").write_text("{")


def strange_meta(folder: Path) -> None:
    (folder / "meta.json").write_text(json.dumps({"recipe": 1}))


def cut_tokens(folder: Path) -> None:
    os.truncate(folder / "train.tokens", 100)


def grow_starts(folder: Path) -> None:
    with open(folder / "validation.starts", "ab") as file:
        file.write(b"\0")


def remove_starts(folder: Path) -> None:
    (folder / "train.starts").unlink()


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    "damage", [remove_meta, spoil_meta, strange_meta, cut_tokens, grow_starts, remove_starts, empty_folder]
)
def test_a_damaged_cache_is_made_again_with_a_warning(config, damage, builds, caplog):
    before = texts_of(config, "train")
    damage(cache_of(config.data).folder)
    assert texts_of(config, "train") == before
    assert len(builds) == 2 and "damaged and made again" in caplog.text
    assert texts_of(config, "train") == before
    assert len(builds) == 2


def test_another_tokenizer_file_is_damage(config, builds):
    config.data.tokenizer, config.data.bpe_vocab = "bpe", 300
    found = cache_of(config.data)
    path = found.folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert cache_of(config.data).tokenizer.fingerprint == found.tokenizer.fingerprint
    assert len(builds) == 2


def test_a_wrong_memory_of_the_texts_does_no_harm(config, monkeypatch):
    monkeypatch.setattr("stoker.data.documents._FRESH_SECONDS", -1.0)
    before = texts_of(config, "train")
    (remembered,) = (Path(config.data.cache) / "versions").iterdir()
    for content in ("", "x" * 32, "\n" * 32):
        remembered.write_text(content)
        assert texts_of(config, "train") == before


def test_a_builder_killed_in_the_middle_is_followed_by_one_that_succeeds(config, monkeypatch):
    pid = os.fork()
    if pid == 0:
        try:
            monkeypatch.setattr(cache_module, "sync_directory", lambda folder: os.kill(os.getpid(), signal.SIGKILL))
            cache_of(config.data)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert list(Path(config.data.cache).glob("*.unfinished"))
    assert len(texts_of(config, "train")) > 20
    assert not list(Path(config.data.cache).glob("*.unfinished"))


@pytest.mark.parametrize("damaged", [False, True])
def test_builders_at_the_same_time_all_end_well_and_one_builds(config, tmp_path, monkeypatch, damaged):
    if damaged:
        cut_tokens(cache_of(config.data).folder)
    marks, build = tmp_path / "marks", cache_module._build
    marks.mkdir()

    def slow(*arguments):
        (marks / str(os.getpid())).touch()
        time.sleep(0.2)
        build(*arguments)

    monkeypatch.setattr(cache_module, "_build", slow)
    pids = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(0 if len(texts_of(config, "train")) > 20 else 3)
            finally:
                os._exit(4)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 4
    assert len(list(marks.iterdir())) == 1


def test_a_text_that_changes_while_it_is_tokenised_is_an_error_and_leaves_nothing(config, monkeypatch):
    def change_and_build(*arguments):
        write_text(Path(config.data.path) / "text-003.txt", "another")
        build(*arguments)

    build = cache_module._build
    monkeypatch.setattr(cache_module, "_build", change_and_build)
    with pytest.raises(ValueError, match=r"document text-003.txt changed while it was being tokenised"):
        cache_of(config.data)
    assert not list(Path(config.data.cache).glob("*.unfinished"))


def test_a_cache_directory_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").touch()
    config.data.cache = str(tmp_path / "file" / "cache")
    with pytest.raises(
        ValueError, match=r"cannot keep tokens in .*file/cache: Not a directory; name another data.cache"
    ):
        cache_of(config.data)


def test_the_default_cache_follows_xdg(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    config.data.cache = None
    assert cache_of(config.data).folder.parent == tmp_path / "xdg" / "stoker"


def test_large_vocabularies_are_kept_in_four_bytes(config):
    config.data.tokenizer, config.data.bpe_vocab = "bpe", 70_000
    tokens = cache_of(config.data).tokens("train")
    assert tokens.ids.dtype == np.uint32 and tokens.ids.max() < 70_000


def test_more_texts_make_another_cache_beside_the_first(config, builds):
    first = cache_of(config.data).folder
    write_texts(Path(config.data.path), 41)
    assert cache_of(config.data).folder != first and first.exists()
    assert len(builds) == 2


def test_a_document_without_text_is_counted(config):
    write_text(Path(config.data.path) / "empty.txt", "")
    assert cache_of(config.data).left_out == 1
    assert IndexedLoader(open_rows(config, "train"), 24).metrics()["data.texts.leftovers"] == 1


def test_a_folder_of_an_earlier_version_is_read_and_what_it_did_not_count_is_unknown(config):
    folder = cache_of(config.data).folder
    meta = json.loads((folder / "meta.json").read_text())
    meta["recipe"]["format"] = 2
    del meta["left_out"], meta["recipe"]["encoder"]
    (folder / "meta.json").write_text(json.dumps(meta))
    found = open_folder(folder)
    assert found.left_out is None and found.encoder is None and len(found.tokens("train").starts) > 20
    config.data.target, config.data.path, config.data.tokenizer = (
        "stoker.data.token_files:open_source",
        str(folder),
        None,
    )
    assert "data.texts.leftovers" not in IndexedLoader(open_rows(config, "train"), 24).metrics()
    meta["recipe"]["format"] = 1
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="it has format 1, and this version reads 3"):
        open_folder(folder)
