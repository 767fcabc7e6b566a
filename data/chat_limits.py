"""Chat templates are untrusted programs: limits of their time, memory and output, and their date.

They run in the sandbox of transformers (jinja2's ImmutableSandboxedEnvironment), which limits neither time nor memory.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import FrameType
from typing import Any

from jinja2 import TemplateError

_CLOCK = threading.RLock()  # the clock of transformers is one for all threads
_MEMORY_FACTOR = 16  # a template may hold so many times what it may write


@dataclass(frozen=True)
class Limits:
    """Of one rendering."""

    seconds: float = 10.0  # of processor time
    megabytes: float = 64.0  # of text

    @property
    def characters(self) -> int:
        return int(self.megabytes * 1e6)


class LimitReached(Exception):
    """A template took too much time or memory, or wrote too much."""


@contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Raises LimitReached where the block takes more time or memory than `limits` allow.

    The time is limited by a signal, which Python delivers to the main thread only: other threads have no limit.
    An operation that cannot be interrupted, such as one on very long integers, ends first.
    """
    memory = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space(limits, memory), memory[1]))
    try:
        with timed(limits):
            yield
    except MemoryError as error:
        raise LimitReached(f"it needs more memory than {_MEMORY_FACTOR * limits.megabytes:g} MB") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)


@contextmanager
def dated(date: datetime | None) -> Iterator[None]:
    """Templates get `date` from `strftime_now`; without a date that call is an error.

    Transformers gives templates the clock: a run whose tokens depend on the day of its start is no function of its
    config and data.
    """
    from transformers.utils import chat_template_utils

    with _CLOCK:
        before = chat_template_utils.datetime, _Clock.fixed
        chat_template_utils.datetime, _Clock.fixed = _Clock, date
        try:
            yield
        finally:
            chat_template_utils.datetime, _Clock.fixed = before


class _Clock(datetime):
    fixed: datetime | None = None

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        if cls.fixed is None:
            raise TemplateError("it writes the date (strftime_now): data.args.date=YYYY-MM-DD fixes it")
        return cls.fixed


def _address_space(limits: Limits, memory: tuple[int, int]) -> int:
    """Bytes of address space that the process may have, or its present limit where that is lower."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            pages = int(file.read(100).split()[0])
    except OSError:  # not Linux, where address space is not limited this way
        return memory[0]
    wanted = pages * resource.getpagesize() + _MEMORY_FACTOR * int(limits.megabytes * 1e6)
    return min((limit for limit in (wanted, *memory) if limit != resource.RLIM_INFINITY), default=wanted)


@contextmanager
def timed(limits: Limits) -> Iterator[None]:
    """Raises LimitReached where the block takes more processor time than `limits` allow."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise LimitReached(f"it runs for more than {limits.seconds:g} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
