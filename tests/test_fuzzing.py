"""`benchmarks/fuzz.py` reads thousands of files; these are enough to see that what it looks for would be found."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import fuzzing
from tests.fuzz_subjects import SUBJECTS


@pytest.mark.long
def test_mutated_files_run_no_code_open_nothing_elsewhere_and_end_in_no_traceback(tmp_path: Path) -> None:
    count = 10 * len(SUBJECTS)
    found = fuzzing.fuzz(tmp_path, SUBJECTS, seed=0, numbers=range(count))
    assert sum(found.values()) == count
    for subject in SUBJECTS:
        if "run" not in subject.name:  # of whose many files a command reads few
            assert found[f"{subject.name} refused"] >= 1, found


@pytest.mark.parametrize(
    ("misdeed", "seen"),
    [
        (lambda place: exec("1"), "compile"),
        (lambda place: open("/etc/hostname").close(), "open /etc/hostname"),
        (lambda place: (place.parents[1] / "elsewhere").touch(), "open .*elsewhere"),
        (lambda place: print("\x1b[2J"), "control sequences"),
        (lambda place: {}["missing"], "KeyError"),
        (lambda place: bytearray(b"x" * (128 << 20)), "MiB"),
    ],
)
def test_what_a_reader_may_not_do_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, misdeed, seen: str) -> None:
    monkeypatch.setattr(fuzzing, "MEBIBYTES", 64)
    done: list[Path] = []

    def read(place: Path) -> None:
        done.append(place)
        if len(done) > 1:  # not with the sound file
            misdeed(place)

    with pytest.raises(AssertionError, match=rf"0-0: one/a: .*{seen}"):
        _fuzz(tmp_path, read)


def test_threads_of_tests_before_are_not_the_readers(tmp_path: Path) -> None:
    stop, opened = threading.Event(), threading.Event()

    def look() -> None:
        while not stop.is_set():
            Path("/etc/hostname").read_text()
            opened.set()

    def read(place: Path) -> None:
        opened.clear()
        assert opened.wait(20)

    bystander = threading.Thread(target=look)
    bystander.start()
    try:
        _fuzz(tmp_path, read)
    finally:
        stop.set()
        bystander.join()


def test_a_thread_that_a_reader_starts_is_watched(tmp_path: Path) -> None:
    def read(place: Path) -> None:
        thread = threading.Thread(target=lambda: Path("/etc/hostname").read_text())
        thread.start()
        thread.join()

    with pytest.raises(AssertionError, match="open /etc/hostname"):
        _fuzz(tmp_path, read)


def _fuzz(folder: Path, read: Callable[[Path], None]) -> None:
    """One mutated file, in a folder of one."""
    subject = fuzzing.Subject("one", lambda place: (place.mkdir(), (place / "a").write_text("x")), read)
    (folder / "files").mkdir()
    fuzzing.fuzz(folder / "files", [subject], seed=0, numbers=range(1))
