"""Work on the parts of a source, on all cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any, TypeVar

from stoker.conf.parent_death import die_with

_WORTH_FORKING = 16 << 20  # bytes of text: less is done faster than processes start

T = TypeVar("T")
_work: Callable[[int], Any] | None = None  # of a forked process


class Killed(ValueError):
    """A process was killed. The results of the others are kept."""


def each(work: Callable[[int], T], sizes: Sequence[int], label: str, processes: int | None = None) -> list[T]:
    """`work(n)` for every n in `range(len(sizes))`, in parallel processes where `sizes` (bytes) are large enough.

    The processes are forked: `work` and what it refers to need not be picklable, its result must be. On a terminal a
    bar labelled `label` shows the progress. Raises what `work` raises, as ValueError if it is one, and Killed when a
    process is killed; the others end after their present part.
    """
    processes = processes or _cores()
    with ExitStack() as stack:
        advance = stack.enter_context(_Bar(label, sum(sizes)))
        if processes == 1 or len(sizes) < 2 or sum(sizes) < _WORTH_FORKING:
            results = []
            for number, size in enumerate(sizes):
                results.append(work(number))
                advance(size)
            return results
        pool = ProcessPoolExecutor(
            min(processes, len(sizes)),
            mp_context=multiprocessing.get_context("fork"),
            initializer=_settle,
            initargs=(os.getpid(), work),
        )
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        futures = {pool.submit(_do, number): number for number in range(len(sizes))}
        try:
            for future in as_completed(futures):
                problem = future.result()[0]
                if problem is not None:
                    raise problem
                advance(sizes[futures[future]])
        except BrokenProcessPool as error:
            raise Killed(
                f"a process that was {label} was killed, most often because memory ran out: start again, "
                "finished parts are kept"
            ) from error
        return [future.result()[1] for future in futures]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settle(parent: int, work: Callable[[int], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; this process ends with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not forked


def _do(number: int) -> tuple[Exception | None, Any]:
    assert _work is not None
    try:
        return None, _work(number)
    except ValueError as error:
        return ValueError(str(error)), None
    except Exception:
        return RuntimeError(traceback.format_exc()[-8000:]), None


class _Bar:
    """A progress bar on stderr, if it is a terminal, for work that takes longer than a moment."""

    def __init__(self, label: str, size: int) -> None:
        self._label, self._size = label, size

    def __enter__(self) -> Callable[[int], None]:
        self._progress: Any = None
        if not sys.stderr.isatty() or self._size < _WORTH_FORKING:
            return lambda size: None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._progress.start()
        task = self._progress.add_task(self._label, total=self._size)
        return lambda size: self._progress.advance(task, size)

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
