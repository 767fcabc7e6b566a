"""Inspecting a run's checkpoints: list, verification, comparison."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from stoker.checkpoint import Summary, describe, verify
from stoker.conf.printable import printable
from stoker.conf.rundir import RunDirectory
from stoker.conf.values import ConfigError
from stoker.trainer.report.progress import size

if TYPE_CHECKING:
    from stoker.checkpoint.compare import Difference


def console_for_tables() -> Console:
    """A terminal keeps its width; a file or a pipe gets whole lines."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    return console


def run_at(path: str) -> RunDirectory:
    """The run directory at `path`. Raises ConfigError for any other directory."""
    if not path:
        raise ConfigError("the run directory is empty text (is a variable of the shell not set?)")
    run = RunDirectory(Path(path).expanduser().absolute())
    if not run.attempts.is_dir():
        raise ConfigError(f"{run.path} is not a run directory: it has no {run.attempts.name}")
    return run


def checkpoints_of(run: RunDirectory, step: int | None = None) -> list[Summary]:
    """The run's checkpoints, oldest first, or the one of `step`. Raises ConfigError when there is none."""
    found = describe(run.checkpoints)
    if not found:
        raise ConfigError(f"{run.path} has no checkpoints yet")
    if step is None:
        return found
    chosen = [summary for summary in found if summary.step == step]
    if not chosen:
        steps = ", ".join(str(summary.step) for summary in found)
        raise ConfigError(f"{run.path} has no checkpoint of step {step}; there are {steps}")
    return chosen


def list_checkpoints(path: str) -> int:
    """Print a table; status 1 if one of them is damaged."""
    found = checkpoints_of(run_at(path))
    right = functools.partial(Column, justify="right", no_wrap=True)
    columns = (right("step"), Column("saved", no_wrap=True), right("size"), Column("layout", no_wrap=True))
    table = Table(*columns, right("ranks"), right("loss"), "state", box=None, pad_edge=False, header_style="bold")
    for summary in found:
        table.add_row(
            f"{summary.step:,}",
            "" if summary.time is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(summary.time)),
            "" if summary.bytes is None else size(summary.bytes),
            Text(printable(summary.layout or "")),
            "" if summary.ranks is None else str(summary.ranks),
            "" if summary.loss is None else f"{summary.loss:.4f}",
            "valid" if summary.problem is None else Text(f"damaged: {printable(summary.problem)}", "red"),
        )
    console_for_tables().print(table)
    return int(any(summary.problem for summary in found))


def verify_checkpoints(path: str, step: int | None) -> int:
    """Read every byte of the checkpoints and print all faults; status 1 if there are any."""
    found = checkpoints_of(run_at(path), step)
    console = Console()
    problems: dict[int, list[str]] = {}
    columns = (TextColumn("step {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for summary in found:
            task = progress.add_task(str(summary.step), total=summary.bytes)
            problems[summary.step] = verify(summary.path, functools.partial(_advance, progress, task))
    for at, lines in problems.items():
        console.print(f"step {at}: " + ("valid, every byte read" if not lines else "damaged"))
        for line in lines:
            console.print(f"  {printable(line)}", highlight=False, markup=False, soft_wrap=True)
    return int(any(problems.values()))


def _advance(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def compare_checkpoints(path: str, first: int, second: int, kinds: Sequence[str], most: int | None) -> int:
    """Print what differs between two steps, at most so many tensors, of some kinds; status 1 if anything does."""
    from stoker.checkpoint.compare import compare

    run = run_at(path)
    old, new = (checkpoints_of(run, step)[0].path for step in (first, second))
    console = console_for_tables()
    columns = (TextColumn("comparing tensors"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        found = compare(old, new, functools.partial(_advance, progress, progress.add_task("")), kinds)
    if unknown := [kind for kind in kinds if kind not in found.kinds]:
        raise ConfigError(f"--kind {unknown[0]}: the kinds of tensors there are {', '.join(found.kinds)}")
    for table in _difference(found, first, second, most):
        console.print(table)
    return int(not found.empty)


def _difference(found: Difference, first: int, second: int, most: int | None) -> list[Table | str]:
    parts: list[Table | str] = []
    for title, changes in (("config", found.config), ("state", found.state)):
        if changes:
            table = Table(title, f"step {first}", f"step {second}", box=None, pad_edge=False, header_style="bold")
            for change in changes:
                table.add_row(*(Text(printable(text)) for text in (change.key, change.first, change.second)))
            parts += [table, ""]
    if found.tensors:
        columns = (Column("tensor", no_wrap=True), Column("relative change", justify="right"), "")
        table = Table(*columns, box=None, pad_edge=False, header_style="bold")
        for tensor in found.tensors[:most]:
            what = "" if tensor.relative is not None else tensor.what
            relative = "" if tensor.relative is None else f"{tensor.relative:.3e}"
            table.add_row(Text(printable(f"{tensor.kind}/{tensor.name}")), relative, Text(printable(what)))
        parts.append(table)
    more = 0 if most is None else len(found.tensors) - most
    parts.append(
        f"{found.equal_tensors} tensors are equal, {len(found.tensors)} differ"
        + (f" ({more} not shown; --all shows them)" * (more > 0))
    )
    return parts
