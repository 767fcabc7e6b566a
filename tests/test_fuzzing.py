"""`benchmarks/fuzz.py` reads thousands of files; these are enough to see that what it looks for would be found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import fuzzing


@pytest.mark.long
def test_mutated_files_run_no_code_open_nothing_elsewhere_and_end_in_no_traceback(tmp_path: Path) -> None:
    found = fuzzing.fuzz(tmp_path, seed=0, count=20 * len(fuzzing.SUBJECTS))
    assert sum(found.values()) == 20 * len(fuzzing.SUBJECTS)
    for subject in fuzzing.SUBJECTS:
        if subject.name != "run":  # commands answer by their status
            assert found[f"{subject.name} refused"] >= 3, found


@pytest.mark.parametrize(
    ("misdeed", "seen"),
    [
        (lambda place: exec("1"), "compile"),
        (lambda place: open("/etc/hostname").close(), "open /etc/hostname"),
        (lambda place: (place.parents[1] / "elsewhere").touch(), "open .*elsewhere"),
        (lambda place: print("\x1b[2J"), "control sequences"),
        (lambda place: {}["missing"], "KeyError"),
    ],
)
def test_what_a_reader_may_not_do_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, misdeed, seen: str) -> None:
    done: list[Path] = []

    def read(place: Path) -> None:
        done.append(place)
        if len(done) > 1:  # not with the sound file
            misdeed(place)

    subject = fuzzing.Subject("one", lambda place: (place.mkdir(), (place / "a").write_text("x")), read)
    monkeypatch.setattr(fuzzing, "SUBJECTS", [subject])
    (tmp_path / "files").mkdir()
    with pytest.raises(AssertionError, match=rf"seed 0, number 0: one/a: .*{seen}"):
        fuzzing.fuzz(tmp_path / "files", seed=0, count=1)
