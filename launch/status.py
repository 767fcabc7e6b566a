"""`stoker status`: how a run is doing, from the files in its directory, on any machine that sees them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.table import Column, Table
from rich.text import Text

from stoker.checkpoint import newest
from stoker.checkpoint.names import MANIFEST, step_of
from stoker.conf.printable import printable
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.units import loss_unit
from stoker.launch.control import living
from stoker.launch.inspect import console_for_tables, run_at
from stoker.launch.slurm.notes import read_notes
from stoker.trainer.report import task_results
from stoker.trainer.report.goodput import goodput
from stoker.trainer.report.metrics import read_recent
from stoker.trainer.report.progress import Pace, duration
from stoker.trainer.report.routing import in_words
from stoker.trainer.runtime.outcome import read_beginning, read_ending
from stoker.trainer.runtime.process import Stamp, read_stamps


@dataclass(frozen=True)
class Attempt:
    """A line of the table."""

    number: int
    began: float | None  # seconds since the epoch
    from_step: int | None
    ranks: int | None
    where: str
    ended: float | None
    outcome: str
    step: int | None
    message: str


def status(path: str) -> int:
    """Print it; status 0 while the run is running or has ended well, else 1."""
    run = run_at(path)
    alive = living(run)
    attempts = attempts_of(run, alive)
    console = console_for_tables()
    rows = [("run", str(run.path)), *facts(run, attempts, alive)]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"{name:<{width}}  {printable(value)}", soft_wrap=True, markup=False)
    console.print()
    console.print(_table(attempts))
    well = attempts and attempts[-1].outcome in ("completed", "stopped", "preempted")
    return 0 if alive is not None or well else 1


def facts(run: RunDirectory, attempts: list[Attempt], alive: Stamp | None) -> list[tuple[str, str]]:
    """Rows about the run as a whole, as (name, value)."""
    rows = [("state", _state(run, attempts, alive))]
    steps = read_recent(run.metrics)
    if steps:
        last = steps[-1]
        config = read_config(run)
        total = config.steps
        rows.append(("step", f"{last['step']:,} of {total:,}"))
        if last.get("loss") is not None:
            rows.append(("loss", f"{last['loss']:.4f} {loss_unit(config.objective)}"))
        began = (attempts[-1].from_step or 0) if attempts else 0
        pace = Pace.of([step for step in steps if step["step"] > began] or steps)  # as the live view of these ranks
        if pace.step_seconds:
            used = f", MFU {pace.mfu:.1%}" if pace.mfu else ""
            rows.append(("speed", f"{pace.tokens_per_second:,.0f} tokens/s, {pace.step_seconds:.3g} s a step{used}"))
            if alive is not None and last["step"] < total:
                rows.append(("time left", pace.left(last["step"], total)))
        if (experts := in_words(last)) is not None:
            rows.append(("experts", experts))
        if (answers := next(filter(None, map(task_results.in_words, reversed(steps))), None)) is not None:
            rows.append(("tasks", answers))
    rows.append(("checkpoint", _checkpoint(run)))
    spent = goodput(run, time.time() if alive is not None else None)
    if spent.total:
        rows.append(("goodput", f"{spent} of {duration(spent.total)}"))
    return rows


def attempts_of(run: RunDirectory, alive: Stamp | None) -> list[Attempt]:
    """All of them, oldest first."""
    numbers = run.attempt_numbers()
    found = []
    for number in numbers:
        beginning, ending = read_beginning(run, number), read_ending(run, number)
        stamps = list(read_stamps(run.attempt(number)).values())
        hosts = sorted({stamp.host for stamp in stamps})
        where = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
        if beginning is not None and beginning.job is not None:
            where += f" (job {beginning.job})"
        running = alive is not None and number == numbers[-1]
        found.append(
            Attempt(
                number=number,
                began=beginning.time if beginning is not None else None,
                from_step=beginning.from_step if beginning is not None else None,
                ranks=beginning.ranks if beginning is not None else None,
                where=where,
                ended=ending.time if ending is not None else None,
                outcome=str(ending.outcome) if ending is not None else "running" if running else "dead",
                step=ending.step if ending is not None else max((stamp.step for stamp in stamps), default=None),
                message=ending.message if ending is not None else "" if running else "left no exit record",
            )
        )
    return found


def _state(run: RunDirectory, attempts: list[Attempt], alive: Stamp | None) -> str:
    if alive is not None:
        return f"{alive.phase} of step {alive.step:,}, {_ago(alive.time)}, on {alive.host}"
    notes = read_notes(run)
    last = attempts[-1].message if attempts else "has not begun"
    began = (attempts[-1].began or 0.0) if attempts else 0.0
    if notes and notes[-1]["move"] in ("requeue", "next", "submit") and notes[-1]["time"] >= began:
        return f"{last}; job {notes[-1]['job']} waits in the queue"
    return last


def _checkpoint(run: RunDirectory) -> str:
    found = newest(run.checkpoints)
    if not found:
        return "none yet"
    manifest = found[0] / MANIFEST
    return f"step {step_of(found[0]):,}, {_ago(manifest.stat().st_mtime)} ({len(found)} kept)"


def _ago(moment: float) -> str:
    return f"{duration(max(0.0, time.time() - moment))} ago"


def _table(attempts: list[Attempt]) -> Table:
    def right(name: str) -> Column:
        return Column(name, justify="right", no_wrap=True)

    def at(moment: float | None) -> str:
        return "" if moment is None else time.strftime("%m-%d %H:%M:%S", time.localtime(moment))

    def number(value: int | None) -> str:
        return "" if value is None else f"{value:,}"

    columns = (right("attempt"), "began", right("from step"), "ended", "outcome", right("step"), right("ranks"))
    table = Table(*columns, "on", Column("", overflow="fold"), box=None, pad_edge=False, header_style="bold")
    for attempt in attempts:
        counts = (number(attempt.step), number(attempt.ranks))
        times = (at(attempt.began), number(attempt.from_step), at(attempt.ended))
        texts = (Text(printable(text)) for text in (attempt.where, attempt.message))  # as they are: no markup of rich's
        table.add_row(str(attempt.number), *times, attempt.outcome, *counts, *texts)
    return table
