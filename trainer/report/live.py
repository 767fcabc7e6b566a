"""The live view: a few lines at the bottom of a terminal, redrawn by a separate thread.

A step only leaves its record behind; the thread formats the newest one at most `FRAMES_PER_SECOND` times a second. The
cursor is never hidden, so that a killed process leaves a terminal as it was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TextIO

from stoker.conf.schema import Config
from stoker.trainer.report.observer import CheckpointReport, Observer, StepRecord
from stoker.trainer.report.progress import (
    Pace,
    describe_save,
    duration,
    memory_bytes,
    number,
    rate,
    size,
    skip_reason,
)

FRAMES_PER_SECOND = 3
BAR = 36  # columns


class LiveProgress(Observer):
    """Draws on `screen`, which should be a terminal that supports ANSI sequences."""

    name = "progress"

    def __init__(self, screen: TextIO) -> None:
        self._screen = screen
        self._live: Any = None
        self._total_steps = 0
        self._step = 0
        self._record: StepRecord | None = None
        self._evaluation = ""
        self._skipped = 0
        self._save = ("nothing saved yet", "dim")
        self._pace = Pace()

    def start(self, config: Config, resumed_from_step: int | None, total_steps: int, facts: Mapping[str, str]) -> None:
        from rich.live import Live

        console = _console(self._screen)
        self._total_steps = total_steps
        self._step = resumed_from_step or 0
        if resumed_from_step is not None:
            self._save = (f"resumed from step {resumed_from_step}", "")
        for name, fact in facts.items():
            console.print(f"[dim]{name:<10}[/dim] ", end="")
            console.print(fact, markup=False)
        self._live = Live(
            console=console,
            get_renderable=self._frame,
            refresh_per_second=FRAMES_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start(refresh=True)

    def step(self, record: StepRecord) -> None:
        self._pace.add(record)
        self._step, self._record = record.step, record
        if record.val_loss is not None:
            beside = f", train {number(train)}" if (train := record.extra.get("train_loss")) is not None else ""
            self._evaluation = f"{number(record.val_loss)}{beside} at step {record.step}"
        if record.skipped:
            self._skipped += 1
            self.message(f"step {record.step} skipped: {skip_reason(record)}")

    def saving(self, step: int) -> None:
        self._save = (f"saving step {step} ...", "yellow")

    def checkpoint(self, report: CheckpointReport) -> None:
        self._save = (describe_save(report), "green" if report.error is None else "bold red")
        if report.error is not None:
            self.message(f"checkpoint {describe_save(report)}")

    def message(self, text: str) -> None:
        if self._live is None:
            print(text, file=self._screen, flush=True)
        else:
            self._live.console.print(text, markup=False)

    def finish(self, outcome: str, step: int) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _frame(self) -> Any:
        from rich.text import Text

        record, pace = self._record, self._pace
        left = duration((self._total_steps - self._step) * pace.step_seconds) if record else "-"
        filled = round(BAR * self._step / max(1, self._total_steps))
        frame = Text.assemble(
            ("━" * filled, "green"),
            ("━" * (BAR - filled), "bright_black"),
            (f"  step {self._step:,}/{self._total_steps:,}", "bold"),
            f"   eta {left}\n",
            overflow="ellipsis",
            no_wrap=True,
        )

        def line(name: str, value: str, style: str = "bold", **more: str) -> None:
            frame.append(f"{name:<12}", "dim").append(f"{value:<15}" if more else value, style)
            for key, text in more.items():
                frame.append(f"  {key.replace('_', ' ')} ", "dim").append(text, "bold")
            frame.append("\n")

        norm = number(record.grad_norm if record else None, 2)
        line("loss", number(record.loss if record else None), norm=norm, lr=rate(record.lr) if record else "-")
        if self._evaluation:
            line("val loss", self._evaluation)
        speed = f"{pace.tokens_per_second:,.0f} tok/s" if record else "-"
        line("speed", speed, data_wait=f"{pace.data_share:.0%}", memory=size(memory_bytes()))
        line("checkpoint", *self._save)
        if self._skipped:
            line("skipped", f"{self._skipped} step{'s' if self._skipped > 1 else ''}", "yellow")
        return frame  # ends in a line of its own, where the cursor rests


def _console(screen: TextIO) -> Any:
    from rich.console import Console, ConsoleDimensions

    class Screen(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False

        @property  # type: ignore[misc]  # the original can be set, for which there is no use
        def size(self) -> ConsoleDimensions:
            # rich asks the standard streams, and those of a rank are log files
            try:
                width, height = os.get_terminal_size(screen.fileno())
            except (OSError, ValueError):
                return ConsoleDimensions(80, 25)
            return ConsoleDimensions(width or 80, height or 25)

    return Screen(file=screen, force_terminal=True, highlight=False, soft_wrap=False)
