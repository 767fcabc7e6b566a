from __future__ import annotations

import errno
import itertools
import os

import pytest

from stoker.conf.reasons import reason, root_cause, with_cause


def chained(*errors: BaseException) -> BaseException:
    """The first raised from the second, and so on."""
    for error, cause in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[0]


def test_the_line_has_the_text_of_the_error_that_caused_the_others():
    wrapped = chained(RuntimeError("stage 1 failed\nTraceback ..."), OSError("broken"), ValueError("width 3 is odd"))
    assert reason(wrapped) == "stage 1 failed: width 3 is odd"
    assert root_cause(wrapped).args == ("width 3 is odd",)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("alone"), "alone"),
        (RuntimeError(), "RuntimeError"),
        (chained(ValueError("cannot read a.json: not JSON"), ValueError("not JSON")), "cannot read a.json: not JSON"),
        (chained(RuntimeError("odd"), ValueError("width 3 is odd")), "width 3 is odd"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a"), "/a: No space left on device"),
        (
            chained(RuntimeError("writer"), OSError(errno.EIO, "Input/output error", "/a")),
            "writer: /a: Input/output error",
        ),
    ],
    ids=str,
)
def test_no_message_is_repeated(error, line):
    assert reason(error) == line


def test_causes_in_a_circle_come_to_an_end():
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert reason(one) == "one: other"


def test_what_was_being_handled_by_chance_is_no_cause():
    error = ValueError("b")
    error.__context__ = KeyError("a")
    assert reason(error) == "b"


def test_errors_of_several_lines_for_users_keep_them():
    assert with_cause(chained(ValueError("two things:\n  a\n  b"), ValueError("c"))) == "two things:\n  a\n  b: c"
