"""The tables of a report, as plain text cells: the page and the Markdown show the same ones."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import kinds, lookup
from stoker.launch.report.gather import Gathered, config_differences
from stoker.launch.report.svg import short
from stoker.trainer.report.breakdown import OVER_RANKS
from stoker.trainer.report.goodput import BOOKS
from stoker.trainer.report.predicted import COLUMNS, cells
from stoker.trainer.report.progress import brief, duration, size
from stoker.trainer.report.summary import marks_of
from stoker.trainer.report.task_results import STEP, results

MOST_ROWS = 100  # of a table whose rows are events; the newest ones
_LISTED = 30  # steps in a list


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    numbers: bool = True  # all columns but the first are figures
    folded: bool = False  # long, and rarely wanted
    most: int = MOST_ROWS


def tables(runs: list[Gathered]) -> list[Table]:
    """All tables that have a row, in the order of the report."""
    found = [_results(runs), _config_table(runs)]
    for run in runs:
        of = f" of {run.name}" if len(runs) > 1 else ""
        own = [_attempts(run), _planned(run), _seconds(run), _phases(run), _bad_steps(run)]
        own += [_tasks(run), _checkpoints(run), _saves(run), _data(run), _whole(run)]
        for table in own:
            table.title += of
            table.folded = table.folded or len(runs) > 1
        found += own
    found.append(Table("Could not be read", ["run", "what"], [[r.name, line] for r in runs for line in r.problems]))
    found[-1].numbers = False
    return [_bounded(table) for table in found if table.rows]


def facts(run: Gathered) -> list[tuple[str, str]]:
    """The figures of one run that stand at the top: name, value."""
    history, last = run.history, run.history.last
    rows: list[tuple[str, str]] = []
    if last is not None:
        total = f" of {run.config.steps:,}" if run.config is not None else ""
        rows.append(("step", f"{last['step']:,}{total}"))
        rows += [("tokens", short(last["tokens"]))] if last.get("tokens") else []
        for name, key in (("loss", "loss"), ("val loss", "val_loss")):
            if key in history.finite:
                rows.append((name, f"{history.finite[key][1]:.4f}"))
        rows += [("best val loss", f"{run.best[1]:.4f}")] if run.best is not None else []
        speed = run.median_speed
        rows += [("tokens/s, median", short(speed))] if speed is not None else []
        memory = (history.last or {}).get("memory_peak_bytes")
        rows += [("memory, most of a rank", size(memory))] if isinstance(memory, int | float) else []
        if history.skipped:
            rows.append(("skipped steps", f"{history.skipped:,}"))
    if run.total_seconds:
        rows.append(("time", lasting(run.total_seconds)))
        rows.append(("goodput", percent(run.goodput)))
        rows.append(("attempts", f"{len(run.attempts):,}"))
    return rows


def _results(runs: list[Gathered]) -> Table:
    """Several runs beside each other, with the difference of each loss to the first run's."""
    columns = ["run", "step", "tokens", "loss", "to the first", "val loss", "to the first", "best val loss"]
    table = Table("Runs", [*columns, "tokens/s, median", "time", "goodput"], [])
    if len(runs) < 2:
        return table
    first = [_last(runs[0], "loss"), _last(runs[0], "val_loss")]
    for run in runs:
        losses: list[str] = []
        for value, reference in zip((_last(run, "loss"), _last(run, "val_loss")), first, strict=True):
            apart = "" if value is None or reference is None or run is runs[0] else f"{value - reference:+.4f}"
            losses += [_shown(value, ".4f"), apart]
        last = run.history.last or {}
        best = run.best[1] if run.best is not None else None
        row = [run.name, _shown(last.get("step")), short(last.get("tokens") or 0), *losses, _shown(best, ".4f")]
        speed = "" if run.median_speed is None else short(run.median_speed)
        table.rows.append([*row, speed, lasting(run.total_seconds), percent(run.goodput)])
    return table


def _config_table(runs: list[Gathered]) -> Table:
    found = config_differences(runs)
    if len(runs) == 1:
        rows = [[key, kind, _value(values[0])] for key, kind, values in found]
        note = "keys that differ from their defaults"
        return Table("Config", ["key", "kind", "value"], rows, note, numbers=False)
    rows = [[key, kind, *map(_value, values)] for key, kind, values in found]
    note = "keys that are not the same in all runs"
    return Table("Config differences", ["key", "kind", *(run.name for run in runs)], rows, note, numbers=False)


def _whole(run: Gathered) -> Table:
    rows = [] if run.config is None else [[key, _value(lookup(run.config, key))] for key in kinds()]
    return Table("Whole config", ["key", "value"], rows, numbers=False, folded=True, most=len(rows))


def _attempts(run: Gathered) -> Table:
    rows = []
    for attempt in run.attempts:
        beginning, ending = attempt.beginning, attempt.ending
        hosts = attempt.hosts or ((beginning.host,) if beginning is not None else ())
        on = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
        began, start, ranks = (beginning.time, beginning.from_step, beginning.ranks) if beginning else (None,) * 3
        ended = moment(ending.time if ending is not None else None)
        row = [str(attempt.number), moment(began), _shown(start), ended, _shown(attempt.step), _shown(ranks)]
        rows.append([*row, on, attempt.outcome, attempt.message])
    columns = ["attempt", "began", "from step", "ended", "step", "ranks", "on", "outcome", "why"]
    return Table("Attempts", columns, rows, numbers=False)


def _tasks(run: Gathered) -> Table:
    """The newest results of lm-eval's tasks."""
    last = run.history.tasks
    if last is None:
        return Table("Tasks", [], [])
    rows = [
        [task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"]
        for (task, metric), (value, error) in results(last).items()
    ]
    note = f"of lm-eval, with the weights after step {last[STEP]:,.0f}"
    return Table("Tasks", ["task", "metric", "value", "standard error"], rows, note)


def _planned(run: Gathered) -> Table:
    note = "of the newest attempt, as `stoker plan --run` predicted it; medians of steps"
    return Table("Plan against measured", [*COLUMNS], [cells(row) for row in run.planned], note)


def _seconds(run: Gathered) -> Table:
    """Where the time went; the last row has the sums that goodput is made of."""
    columns = ["attempt", "down before", *BOOKS]
    rows = [
        [str(account.number), *map(lasting, (account.down_before, *(account.seconds[name] for name in BOOKS)))]
        for account in run.accounts
    ]
    if rows:
        down = sum(account.down_before for account in run.accounts)
        sums = [sum(account.seconds[name] for account in run.accounts) for name in BOOKS]
        rows.append(["all", *map(lasting, (down, *sums))])
    return Table("Where the time went", columns, rows, "down: a hang before its end was seen, or a node that was lost")


def _phases(run: Gathered) -> Table:
    """Of the newest step that has them; a phase that differs much between ranks is where they wait for each other."""
    rows = []
    for name, value in run.curves.newest.items():
        over = [run.curves.newest.get(f"{name}_{kind}") for kind in OVER_RANKS]
        if name.startswith("phase_") and None not in over:
            label = name.removeprefix("phase_").removesuffix("_seconds").replace("_", " ")
            rows.append([label, *(_shown(seconds, ".4f") for seconds in (*over, value))])
    return Table("Phases of all ranks", ["phase", *OVER_RANKS, "rank 0"], rows, "seconds of the newest profiled step")


def _bad_steps(run: Gathered) -> Table:
    rows = []
    skipped = run.history.skips.items
    if skipped:
        rows.append(["skipped", f"{run.history.skipped:,}", _listed(skipped)])
    if run.history.empty:
        rows.append(["of them without a label", f"{run.history.empty:,}", ""])
    try:
        back = marks_of(run.history, RunDirectory(run.path), run.config).rolled_back if run.config else []
    except (ValueError, OSError):
        back = []  # a start record that is damaged is among the problems
    if back:
        rows.append(["rolled back", f"{len(back):,}", _listed(back)])
    return Table("Bad steps", ["what", "how many", "first steps"], rows, numbers=False)


def _checkpoints(run: Gathered) -> Table:
    rows = []
    for found in run.checkpoints:
        row = [_shown(found.step), moment(found.time), "" if found.bytes is None else size(found.bytes)]
        state = "valid" if found.problem is None else f"damaged: {found.problem}"
        rows.append([*row, found.layout or "", _shown(found.ranks), _shown(found.loss, ".4f"), state])
    columns = ["step", "saved", "size", "layout", "ranks", "loss", "state"]
    return Table("Checkpoints", columns, rows, "manifests, states and file sizes were checked, tensors were not read")


def _saves(run: Gathered) -> Table:
    rows = []
    for save in run.saves:
        seconds = [
            brief(save[key]) if key in save else "" for key in ("checkpoint_seconds", "checkpoint_stall_seconds")
        ]
        speed = save.get("checkpoint_write_bytes_per_second")
        outcome = "failed" if "checkpoint_failed" in save else "saved"
        rows.append([_shown(save["checkpoint_step"]), outcome, *seconds, "" if speed is None else f"{size(speed)}/s"])
    columns = ["step", "outcome", "took", "held training up", "per rank"]
    return Table("Saves", columns, rows, folded=len(rows) > 12)


def _data(run: Gathered) -> Table:
    """A row for each source: the newest of its counts."""
    sources: dict[str, dict[str, float]] = {}
    for key, value in run.curves.newest.items():
        if key.startswith("data."):
            source, _, name = key.removeprefix("data.").rpartition(".")
            sources.setdefault(source or "all sources", {})[name] = value
    names = list(dict.fromkeys(name for counts in sources.values() for name in counts))
    rows = [
        [source, *("" if name not in counts else short(counts[name], 4) for name in names)]
        for source, counts in sources.items()
    ]
    return Table("Data", ["source", *names], rows)


def _bounded(table: Table) -> Table:
    if len(table.rows) > table.most:
        table.note = f"the newest {table.most} of {len(table.rows):,}" + (f"; {table.note}" if table.note else "")
        table.rows = table.rows[-table.most :]
    return table


def _listed(steps: list[int]) -> str:
    more = f", and {len(steps) - _LISTED:,} more" if len(steps) > _LISTED else ""
    return ", ".join(f"{step:,}" for step in steps[:_LISTED]) + more


def _last(run: Gathered, metric: str) -> float | None:
    return run.history.finite[metric][1] if metric in run.history.finite else None


def _shown(value: float | None, form: str = ",") -> str:
    return "" if value is None else format(value, form)


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def percent(share: float | None) -> str:
    return "" if share is None or not math.isfinite(share) else f"{share:.1%}"


def lasting(seconds: float) -> str:
    """A duration; nothing where a damaged record has no sensible one."""
    if not abs(seconds) < 1e10:
        return ""
    return f"{seconds:.1f}s" if 0.05 <= abs(seconds) < 60 else duration(seconds)


def moment(seconds: float | None) -> str:
    """A time in this machine's zone; nothing where a damaged record has no sensible one."""
    if seconds is None or not 0 < seconds < 1e11:
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
