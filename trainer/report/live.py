"""The live view: a few lines at the bottom of a terminal, redrawn by a thread of their own (`Redraw`).

A step only leaves its record behind; the thread formats the newest one. In a narrow terminal what is least important is
left out: the bar gets shorter, then fields go from the right, but step, loss and the time left stay.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from stoker.conf.printable import printable
from stoker.conf.schema import Config
from stoker.trainer.report.observer import CheckpointReport, Observer, StepRecord
from stoker.trainer.report.progress import (
    Pace,
    describe_save,
    memory_bytes,
    number,
    rate,
    size,
    skip_reason,
)
from stoker.trainer.report.redraw import Redraw
from stoker.trainer.report.task_results import in_words

if TYPE_CHECKING:
    from rich.text import Text

BAR = 36  # columns at most
_SHORTEST_BAR = 5


class LiveProgress(Observer):
    """Draws on `screen`, which should be a terminal that supports ANSI sequences."""

    name = "progress"

    def __init__(self, screen: TextIO) -> None:
        self._screen = screen
        self._drawing: Redraw | None = None
        self._total_steps = 0
        self._step = 0
        self._record: StepRecord | None = None
        self._evaluation = ""
        self._skipped = 0
        self._save = ("nothing saved yet", "dim")
        self._pace = Pace()

    def start(self, config: Config, resumed_from_step: int | None, total_steps: int, facts: Mapping[str, str]) -> None:
        console = _console(self._screen)
        self._total_steps = total_steps
        self._step = resumed_from_step or 0
        if resumed_from_step is not None:
            self._save = (f"resumed from step {resumed_from_step}", "")
        for name, fact in facts.items():
            console.print(f"[dim]{name:<10}[/dim] ", end="")
            console.print(printable(fact), markup=False, soft_wrap=True)
        self._drawing = Redraw(console, self._frame)
        self._drawing.start()

    def step(self, record: StepRecord) -> None:
        if self._drawing is not None:
            self._drawing.check()
        self._pace.add(record)
        self._step, self._record = record.step, record
        if record.val_loss is not None:
            beside = f", train {number(train)}" if (train := record.extra.get("train_loss")) is not None else ""
            self._evaluation = f"{number(record.val_loss)}{beside} at step {record.step}"
        if (answers := in_words(record.extra)) is not None:
            self.message(f"tasks: {answers}")
        if record.skipped:
            self._skipped += 1
            self.message(f"step {record.step} skipped: {skip_reason(record)}")

    def saving(self, step: int) -> None:
        self._save = (f"saving step {step} ...", "yellow")

    def checkpoint(self, report: CheckpointReport) -> None:
        self._save = (printable(describe_save(report)), "green" if report.error is None else "bold red")
        if report.error is not None:
            self.message(f"checkpoint {describe_save(report)}")

    def message(self, text: str) -> None:
        if self._drawing is None:
            print(printable(text), file=self._screen, flush=True)
        else:
            self._drawing.print(printable(text))

    def finish(self, outcome: str, step: int) -> None:
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            drawing.stop()

    def _frame(self, columns: int) -> list[Text]:
        record, pace = self._record, self._pace
        left = pace.left(self._step, self._total_steps)
        loss, norm = (number(record.loss), number(record.grad_norm, 2)) if record else ("-", "-")
        lr, speed = (rate(record.lr), pace.speed) if record else ("-", "-")
        memory = size(memory_bytes())
        lines = [
            self._bar(columns, f"step {self._step:,}/{self._total_steps:,}", f"   eta {left}"),
            _line(columns, "loss", loss, norm=norm, lr=lr),
            _line(columns, "speed", speed, data_wait=f"{pace.data_share:.0%}", memory=memory),
            _line(columns, "checkpoint", *self._save),
        ]
        if self._evaluation:
            lines.insert(2, _line(columns, "val loss", self._evaluation))
        if self._skipped:
            lines.append(_line(columns, "skipped", f"{self._skipped} step{'s' if self._skipped > 1 else ''}", "yellow"))
        return lines

    def _bar(self, columns: int, step: str, left: str) -> Text:
        from rich.text import Text

        room = min(BAR, columns - 1 - len(f"  {step}{left}"))
        bar = Text()
        if room >= _SHORTEST_BAR:
            filled = min(room, round(room * self._step / max(1, self._total_steps)))
            bar.append("━" * filled, "green").append("━" * (room - filled), "bright_black").append("  ")
        return _fitting(bar.append(step, "bold").append(left), columns)


def _line(columns: int, name: str, value: str, style: str = "bold", **more: str) -> Text:
    """A name and a value, and as many of `more` as fit."""
    from rich.text import Text

    line = Text.assemble((f"{name:<12}", "dim"), (f"{value:<15}" if more else value, style))
    for key, text in more.items():
        field = Text.assemble((f"  {key.replace('_', ' ')} ", "dim"), (text, "bold"))
        if line.cell_len + field.cell_len >= columns:
            break
        line.append(field)
    line.rstrip()
    return _fitting(line, columns)


def _fitting(line: Text, columns: int) -> Text:
    line.truncate(max(1, columns - 1), overflow="ellipsis")
    return line


def _console(screen: TextIO) -> Any:
    from rich.console import Console, ConsoleDimensions

    class Screen(Console):
        @property  # type: ignore[misc]  # the original can be set, for which there is no use
        def size(self) -> ConsoleDimensions:
            # rich inspects the standard streams, which are log files in a rank
            try:
                width, height = os.get_terminal_size(screen.fileno())
            except (OSError, ValueError):
                return ConsoleDimensions(80, 25)
            return ConsoleDimensions(width or 80, height or 25)

    return Screen(file=screen, force_terminal=True, highlight=False, soft_wrap=False)
