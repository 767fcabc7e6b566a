"""A rank's failure is one line: what a user can fix as it was written, a defect with its class and place."""

from __future__ import annotations

import tarfile

import pytest

from stoker.trainer.failure import in_one_line


def raised(error: Exception, cause: Exception) -> Exception:
    try:
        try:
            raise cause
        except Exception as found:
            raise error from found
    except Exception as found:
        return found


def test_an_error_for_the_user_shows_no_class_of_a_library() -> None:
    error = raised(ValueError("a.tar at byte 7: damaged"), tarfile.TarError("truncated header"))
    assert in_one_line(error) == "a.tar at byte 7: damaged: truncated header"
    error = raised(RuntimeError("stage 1 failed"), ValueError("width 3 is odd"))
    assert in_one_line(error) == "stage 1 failed: width 3 is odd"


@pytest.mark.parametrize("outer", [RuntimeError("stage 1 failed"), TypeError("no such argument")], ids=repr)
def test_a_defect_shows_its_class_and_place(outer: Exception) -> None:
    line = in_one_line(raised(outer, KeyError("width")))
    assert line.startswith(f"KeyError: {outer}: 'width' (") and "test_failure.py:" in line
