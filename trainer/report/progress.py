"""Progress on the screen: plain lines for logs and pipes; `stoker.trainer.report.live` is the view for terminals."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from stoker.conf.printable import printable
from stoker.conf.schema import Config
from stoker.trainer.report.observer import CheckpointReport, Observer, StepRecord
from stoker.trainer.report.task_results import in_words

WINDOW = 50  # steps over which speed is measured


class Pace:
    """Speed over the most recent steps. A process's first step, which warms up, counts only until there is a second."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, ...]] = deque(maxlen=WINDOW)  # tokens, seconds, data seconds, MFU x seconds
        self._warm = False

    @classmethod
    def of(cls, steps: Iterable[Mapping[str, Any]]) -> Pace:
        """The pace of a process whose steps these are, as metrics.jsonl has them."""
        pace = cls()
        for step in steps:
            pace._add(*(step.get(key) or 0.0 for key in ("tokens_per_second", "step_seconds", "data_seconds", "mfu")))
        return pace

    def add(self, record: StepRecord) -> None:
        self._add(record.tokens_per_second, record.step_seconds, record.data_seconds, record.extra.get("mfu", 0.0))

    def _add(self, tokens_per_second: float, seconds: float, data_seconds: float, mfu: float) -> None:
        if not self._warm and self._recent:
            self._recent.clear()
            self._warm = True
        self._recent.append((tokens_per_second * seconds, seconds, data_seconds, mfu * seconds))

    def left(self, step: int, total: int) -> str:
        """How long it will take from after `step` to the end of step `total`, evaluations and saves included."""
        return duration(max(0, total - step) * self.step_seconds) if self._recent else "-"

    @property
    def step_seconds(self) -> float:
        return sum(seconds for _, seconds, *_ in self._recent) / max(1, len(self._recent))

    @property
    def tokens_per_second(self) -> float:
        return self._share(0)

    @property
    def data_share(self) -> float:
        """Share of the time that was spent waiting for rows."""
        return self._share(2)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation; 0 where the peak of the devices is not known."""
        return self._share(3)

    @property
    def speed(self) -> str:
        return f"{self.tokens_per_second:,.0f} tok/s" + (f"  MFU {self.mfu:.1%}" if self.mfu else "")

    def _share(self, column: int) -> float:
        recent = tuple(self._recent)  # the live view reads from its own thread
        seconds = sum(step[1] for step in recent)
        return sum(step[column] for step in recent) / seconds if seconds else 0.0


class PlainProgress(Observer):
    """A line every `every` steps, and one for every other event."""

    def __init__(self, screen: TextIO, every: int, name: str = "progress") -> None:
        self.name = name
        self._screen = screen
        self._every = max(1, every)
        self._total_steps = 0
        self._pace = Pace()
        self._seen_a_step = False

    def start(self, config: Config, resumed_from_step: int | None, total_steps: int, facts: Mapping[str, str]) -> None:
        self._total_steps = total_steps
        for name, fact in facts.items():
            self.message(f"{name:<10} {fact}")
        if resumed_from_step is not None:
            self.message(f"resumed from step {resumed_from_step}")

    def step(self, record: StepRecord) -> None:
        self._pace.add(record)
        if record.skipped:
            self.message(f"step {record.step} skipped: {skip_reason(record)}")
        if record.val_loss is not None:
            beside = f", train loss {train:.4f}" if (train := record.extra.get("train_loss")) is not None else ""
            self.message(f"evaluation at step {record.step}: val loss {record.val_loss:.4f}{beside}")
        if (answers := in_words(record.extra)) is not None:
            self.message(f"tasks: {answers}")
        first, last = not self._seen_a_step, record.step == self._total_steps
        self._seen_a_step = True
        if first or last or record.step % self._every == 0:
            self.message(self._line(record))

    def checkpoint(self, report: CheckpointReport) -> None:
        self.message(f"checkpoint {describe_save(report)}")

    def message(self, text: str) -> None:
        print(printable(text), file=self._screen, flush=True)

    def _line(self, record: StepRecord) -> str:
        return (
            f"step {record.step}/{self._total_steps}  loss {number(record.loss)}  norm {number(record.grad_norm, 2)}"
            f"  lr {rate(record.lr)}  {self._pace.speed}  data {self._pace.data_share:.0%}"
            f"  mem {size(memory_bytes())}  eta {self._pace.left(record.step, self._total_steps)}"
        )


def skip_reason(record: StepRecord) -> str:
    if record.empty:
        return "no label in the whole batch; parameters unchanged"
    return f"loss {number(record.loss)}, gradient norm {number(record.grad_norm)}; parameters unchanged"


def describe_save(report: CheckpointReport) -> str:
    """`saved step 200 (12 MB in 0.4 s, held up 3 ms, 310 MB/s per rank)`, or how it failed."""
    if report.error is not None:
        return f"of step {report.step} failed: {report.error}"
    return (
        f"saved step {report.step} ({size(report.bytes)} in {report.seconds:.1f} s, "
        f"held up {brief(report.stall_seconds)}, {size(report.write_bytes_per_second)}/s per rank)"
    )


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def rate(value: float) -> str:
    """`1.0e-3`."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def size(count: float) -> str:
    """Bytes in decimal units: `312 MB`, `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def brief(seconds: float) -> str:
    """`3 ms`, `1.2 s`."""
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"


def duration(seconds: float) -> str:
    """`42s`, `1m 20s`, `3h 05m`, `2d 04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02}h"


def memory_bytes() -> int:
    """Memory of this process: the peak on its GPU if it uses one, else what is resident now."""
    torch = sys.modules.get("torch")  # not imported for this
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: the peak, which macOS counts in bytes
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
