"""The report as Markdown, for a merge request or a notebook, and as JSON, for programs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from stoker.conf.schema import to_dict
from stoker.launch.report.escaping import markdown
from stoker.launch.report.gather import Gathered, config_differences
from stoker.launch.report.tables import facts, tables
from stoker.trainer.report.curves import Curve


def as_markdown(runs: list[Gathered]) -> str:
    """The figures and tables of the page; the whole config, and what the page folds, is left out."""
    lines = [f"# {markdown(runs[0].name if len(runs) == 1 else f'{len(runs)} runs')}", ""]
    for run in runs:
        lines += [f"{markdown(run.name)}: {markdown(run.state)}", ""]
    if len(runs) == 1:
        lines += ["| | |", "| --- | ---: |"]
        lines += [f"| {markdown(name)} | {markdown(value)} |" for name, value in facts(runs[0])]
        lines.append("")
    for table in tables(runs):
        if table.folded:
            continue
        dashes = ["---", *(["---:" if table.numbers else "---"] * (len(table.columns) - 1))]
        lines += [f"## {markdown(table.title)}", ""]
        lines += [f"{markdown(table.note)}", ""] if table.note else []
        lines += [f"| {' | '.join(map(markdown, table.columns))} |", f"| {' | '.join(dashes)} |"]
        lines += [f"| {' | '.join(map(markdown, row))} |" for row in table.rows]
        lines.append("")
    return "\n".join(lines)


def as_json(runs: list[Gathered]) -> str:
    """Everything a report is made of. Points of a curve: first and last step, mean, least and largest value."""
    values = {
        "runs": [_run(run) for run in runs],
        "config_differences": [
            {"key": key, "kind": kind, "values": found} for key, kind, found in config_differences(runs)
        ],
    }
    return json.dumps(values, allow_nan=False, default=str)


def _run(run: Gathered) -> dict[str, Any]:
    history = run.history
    return {
        "name": run.name,
        "path": str(run.path),
        "state": run.state,
        "running": run.alive is not None,
        "config": None if run.config is None else to_dict(run.config),
        "last": history.last,
        "losses": {key: {"step": step, "value": value} for key, (step, value) in history.finite.items()},
        "best_val_loss": None if run.best is None else {"step": run.best[0], "value": run.best[1]},
        "tokens_per_second_median": run.median_speed,
        "steps": history.count,
        "skipped": history.skipped,
        "seconds": run.seconds,
        "goodput": run.goodput,
        "attempts": [
            {
                "number": attempt.number,
                "outcome": attempt.outcome,
                "beginning": attempt.beginning and dataclasses.asdict(attempt.beginning),
                "ending": attempt.ending and dataclasses.asdict(attempt.ending),
                "hosts": attempt.hosts,
                "step": attempt.step,
            }
            for attempt in run.attempts
        ],
        "accounts": [dataclasses.asdict(account) for account in run.accounts],
        "plan_against_measured": run.planned,
        "checkpoints": [dataclasses.asdict(summary) for summary in run.checkpoints],
        "saves": run.saves,
        "expert_tokens": run.experts and dataclasses.asdict(run.experts),
        "curves": {metric: _points(curve) for metric, curve in run.curves.by_metric.items()},
        "problems": run.problems,
    }


def _points(curve: Curve) -> list[list[float]]:
    return [[point.first, point.last, point.mean, point.least, point.most] for point in curve.points]
