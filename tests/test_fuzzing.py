"""`benchmarks/fuzz.py` reads thousands of files; these are enough to see that what it looks for would be found."""

from __future__ import annotations

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

    subject = fuzzing.Subject("one", lambda place: (place.mkdir(), (place / "a").write_text("x")), read)
    (tmp_path / "files").mkdir()
    with pytest.raises(AssertionError, match=rf"0-0: one/a: .*{seen}"):
        fuzzing.fuzz(tmp_path / "files", [subject], seed=0, numbers=range(1))
