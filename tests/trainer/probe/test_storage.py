"""Rates of storage: direct where there is a disk, and never those of memory."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.trainer.probe import storage
from stoker.trainer.probe.storage import existing, file_system, rates_of, read_rate

SIZE = 16 << 20


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[Path]:
    """A file of which every page is in the page cache, and stays there: it is mapped, and the map is in use."""
    file = tmp_path / "file"
    file.write_bytes(os.urandom(SIZE))
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        with mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ) as mapped:
            assert sum(mapped[:: mmap.PAGESIZE]) >= 0
            yield file


def on_disk(path: Path) -> None:
    if file_system(path) in storage.IN_MEMORY or not hasattr(os, "O_DIRECT"):
        pytest.skip("temporary files are in memory here")


def test_a_cached_file_is_never_reported_as_a_disk(cached: Path) -> None:
    on_disk(cached)
    for _ in range(20):
        found = read_rate("data", cached, SIZE, 5.0, direct=False)
        assert found.rate is None and found.why == "it came from the page cache" and found.bytes == SIZE


def test_a_direct_read_of_a_cached_file_is_one_of_the_disk(cached: Path) -> None:
    on_disk(cached)
    before = storage._bytes_read()
    found = read_rate("data", cached, SIZE, 5.0)
    after = storage._bytes_read()
    assert found.rate is not None and found.rate > 0
    assert before is not None and after is not None and after - before >= SIZE, "the kernel has counted them"


def test_a_folder_in_memory_has_no_rate(tmp_path: Path) -> None:
    if file_system(Path("/dev/shm")) not in storage.IN_MEMORY:
        pytest.skip("no file system in memory")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        found = rates_of("cache", Path(folder), SIZE, 1.0, write=True)
        assert [each.way for each in found] == ["write", "read"]
        assert all(each.rate is None and "in memory" in each.why for each in found)


def test_a_folder_that_does_not_exist_yet_is_measured_where_it_will_be(tmp_path: Path) -> None:
    on_disk(tmp_path)
    written, read = rates_of("checkpoints", tmp_path / "runs" / "a" / "checkpoints", SIZE, 5.0, write=True)
    assert written.path == str(tmp_path) == str(existing(tmp_path / "runs"))
    assert written.rate and read.rate and list(tmp_path.iterdir()) == [], "the scratch file is gone"


def test_data_are_read_and_not_written(tmp_path: Path) -> None:
    on_disk(tmp_path)
    (none,) = rates_of("data", tmp_path, SIZE, 1.0, write=False)
    assert none.rate is None and none.why == "no file of 1 MiB to read"
    (tmp_path / "small").write_bytes(b"x" * 100)
    (tmp_path / "large").write_bytes(os.urandom(2 << 20))
    (read,) = rates_of("data", tmp_path, SIZE, 5.0, write=False)
    assert read.rate and read.path == str(tmp_path / "large") and sorted(os.listdir(tmp_path)) == ["large", "small"]


def test_what_may_not_be_written_is_a_reason_and_no_failure(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    (found,) = rates_of("cache", tmp_path, SIZE, 1.0, write=True)
    assert found.rate is None and "denied" in found.why
