"""What went wrong, in one line, from an exception and the exceptions that caused it."""

from __future__ import annotations


def root_cause(error: BaseException) -> BaseException:
    """The first of the chain of `__cause__` that `error` ends."""
    seen = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in seen:
        error = error.__cause__
        seen.add(id(error))
    return error


def reason(error: BaseException) -> str:
    """The text of `error`, and that of its root cause where the first does not contain it."""
    root = root_cause(error)
    text = _text(error)
    cause = _text(root)
    if root is error or cause in text:
        return text
    return cause if text in cause else f"{text}: {cause}"


def with_cause(error: BaseException) -> str:
    """As `reason`, with all lines of `error`, for the errors that are written for users."""
    root, text = root_cause(error), str(error)
    cause = _text(root)
    return text if root is error or cause in text else f"{text}: {cause}"


def _text(error: BaseException) -> str:
    """The first line: what follows in the errors of libraries is a trace."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip().partition("\n")[0] or type(error).__name__
