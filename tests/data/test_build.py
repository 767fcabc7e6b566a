"""Tokenising on several cores, killed and started again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from stoker.conf.schema import Config
from stoker.data import build, manifest, pool
from stoker.data.cache import verify
from stoker.data.pool import Killed, each
from tests.data.conftest import cache_of, write_text


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of a few documents, and processes for them."""
    monkeypatch.setattr(manifest, "_PART_BYTES", 600)
    monkeypatch.setattr(pool, "_WORTH_FORKING", 0)
    monkeypatch.setattr(pool, "_cores", lambda: 3)


def arrays(config: Config) -> dict[str, list[int]]:
    tokens = cache_of(config.data).tokens("train")
    return {"ids": tokens.ids[:].tolist(), "starts": tokens.starts.tolist()}


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_parts_made_side_by_side_are_the_same_tokens(config, tmp_path, monkeypatch, tokenizer):
    config.data.tokenizer, config.data.bpe_vocab = tokenizer, 300
    expected = arrays(config)
    config.data.cache = str(tmp_path / "other")
    monkeypatch.setattr(manifest, "_PART_BYTES", 600)
    monkeypatch.setattr(pool, "_WORTH_FORKING", 0)
    monkeypatch.setattr(pool, "_cores", lambda: 3)
    assert arrays(config) == expected


def test_a_killed_build_resumes_where_it_was(config, tmp_path, small_parts, monkeypatch):
    made, make = tmp_path / "made", build._make_part
    made.mkdir()
    builder = 0

    def dies_at_the_sixth(folder, number, *rest):
        if len(list(made.iterdir())) >= 5:
            os.kill(builder, signal.SIGKILL)  # its processes end with it
            time.sleep(20)
        make(folder, number, *rest)
        (made / str(number)).touch()

    def counting(folder, number, *rest):
        note = folder / f"{number}.note"
        before = note.stat().st_mtime_ns if note.exists() else None
        make(folder, number, *rest)
        if note.stat().st_mtime_ns != before:
            (made / f"again-{number}").touch()

    pid = os.fork()
    if pid == 0:
        builder = os.getpid()
        monkeypatch.setattr(build, "_make_part", dies_at_the_sixth)
        try:
            cache_of(config.data)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (unfinished,) = Path(config.data.cache).glob("*.unfinished")
    notes = {path.stem for path in (unfinished / "parts").glob("*.note")}
    assert len(notes) >= 5
    for path in made.iterdir():
        path.unlink()
    monkeypatch.setattr(build, "_make_part", counting)
    found = arrays(config)
    again = {path.name.removeprefix("again-") for path in made.iterdir()}
    assert again and not again & notes
    config.data.cache = str(tmp_path / "other")
    assert arrays(config) == found
    assert not list(Path(config.data.cache).glob("*.unfinished"))


def test_a_part_whose_file_is_not_whole_is_made_again(config, small_parts, monkeypatch):
    expected = arrays(config)
    config.data.cache += "-other"
    together = build._put_together
    monkeypatch.setattr(build, "_put_together", lambda *arguments: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(ValueError, match=r"cannot keep tokens in .*: disk full; name another data.cache"):
        cache_of(config.data)
    (part,) = Path(config.data.cache).glob("*.unfinished/parts/1.train.tokens")
    os.truncate(part, 3)
    monkeypatch.setattr(build, "_put_together", together)
    assert arrays(config) == expected


def test_a_bad_document_in_a_process_is_the_same_one_line_error(config, small_parts):
    write_text(Path(config.data.path) / "text-005.txt", b"\xff")
    with pytest.raises(ValueError, match=r"text-005.txt is not UTF-8 text: byte 0xff at offset 0"):
        cache_of(config.data)


def test_a_killed_process_is_reported_as_killed(small_parts):
    def die(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(Killed, match="a process that was counting was killed, most often because memory ran out"):
        each(die, [1] * 8, "counting")


def test_what_was_done_when_a_process_was_killed_is_kept(config, small_parts, monkeypatch):
    make = build._make_part

    def dies(folder, number, *rest):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        make(folder, number, *rest)

    monkeypatch.setattr(build, "_make_part", dies)
    with pytest.raises(ValueError, match="finished parts are kept"):
        cache_of(config.data)
    assert list(Path(config.data.cache).glob("*.unfinished/parts/*"))
    monkeypatch.setattr(build, "_make_part", make)
    assert arrays(config)["ids"]


def test_results_come_in_order_and_processes_end(small_parts):
    found = each(lambda number: (number, os.getpid()), [1] * 20, "counting")
    assert [number for number, _ in found] == list(range(20))
    assert os.getpid() not in {pid for _, pid in found}
    for _, pid in found:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_every_byte_of_a_cache_is_proven(config):
    cache = cache_of(config.data)
    assert verify(cache) == []
    path = cache.folder / "train.tokens"
    ids = np.fromfile(path, np.uint16)
    ids[len(ids) // 2] ^= 1
    ids.tofile(path)
    (problem,) = verify(cache)
    assert "train.tokens: its CRC-32 is" in problem
