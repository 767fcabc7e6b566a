"""Results of lm-eval's tasks in `metrics.jsonl`: `tasks/TASK/METRIC`, and for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

PREFIX = "tasks/"
STEP = f"{PREFIX}step"  # after which they were run
_ERROR = "_stderr"  # of a metric of the name before it


def has_tasks(step: Mapping[str, Any]) -> bool:
    """Whether tasks were run in a line of metrics.jsonl."""
    return isinstance(step.get(STEP), int | float)


def results(step: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Value and standard error by task and metric."""
    found = {}
    for key, value in step.items():
        task, _, metric = key.removeprefix(PREFIX).rpartition("/")
        if key.startswith(PREFIX) and task and not _is_error(metric) and isinstance(value, int | float):
            error = step.get(f"{PREFIX}{task}/{_error_of(metric)}")
            found[task, metric] = value, error if isinstance(error, int | float) else None
    return found


def task_metrics(keys: Iterable[str]) -> list[str]:
    """Those of the `keys` of metrics.jsonl that are metrics of tasks, without their standard errors."""
    return [key for key in keys if key.startswith(PREFIX) and "/" in key[len(PREFIX) :] and not _is_error(key)]


def in_words(step: Mapping[str, Any]) -> str | None:
    """The results of a line of metrics.jsonl; None without any."""
    if not has_tasks(step):
        return None
    by_task: dict[str, list[str]] = {}
    for (task, metric), (value, _) in results(step).items():
        by_task.setdefault(task, []).append(f"{metric} {value:.4g}")
    shown = "; ".join(f"{task} {', '.join(found)}" for task, found in by_task.items())
    return f"{shown or 'failed'} (step {step[STEP]:,.0f})"


def _error_of(metric: str) -> str:
    name, dot, chosen = metric.partition(".")
    return f"{name}{_ERROR}{dot}{chosen}"


def _is_error(metric: str) -> bool:
    return metric.rpartition("/")[2].partition(".")[0].endswith(_ERROR)
