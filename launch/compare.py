"""`stoker compare`: which keys of the config, and which numbers of the steps, are not the same in two runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from stoker.conf.printable import printable
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.schema import kinds, lookup
from stoker.launch.inspect import console_for_tables, run_at
from stoker.trainer.report.metrics import steps

# What a layout, a restart or a machine must not change.
METRICS = ("updates", "loss", "grad_norm", "lr", "tokens", "val_loss", "train_loss")
_OWN = ("run.dir", "run.name")


@dataclass
class Apart:
    """One metric of two runs."""

    metric: str
    first: tuple[int, Any, Any] | None = None  # step and both values, where they differ first
    worst: float = 0.0  # largest relative difference
    worst_step: int = 0
    differing: int = 0  # steps

    def add(self, step: int, one: Any, other: Any) -> None:
        if one == other:
            return
        if self.first is None:
            self.first = (step, one, other)
        self.differing += 1
        relative = relative_difference(one, other)
        if relative > self.worst:
            self.worst, self.worst_step = relative, step


@dataclass
class Comparison:
    """Two metrics files."""

    metrics: dict[str, Apart] = field(default_factory=lambda: {name: Apart(name) for name in METRICS})
    common: int = 0  # steps in both
    last_common: int = 0
    only: tuple[int, int] = (0, 0)  # steps in the first and in the second only

    @property
    def first(self) -> Apart | None:
        """The metric that differs first; of several in one step the first of `METRICS`."""
        found = [(apart.first[0], apart) for apart in self.metrics.values() if apart.first is not None]
        return min(found, key=lambda each: each[0])[1] if found else None

    @property
    def equal(self) -> bool:
        return self.first is None and self.common > 0


def compare_runs(one: str, other: str) -> int:
    """Print it; status 0 if the steps that both have are equal to the last bit, else 1."""
    first, second = run_at(one), run_at(other)
    found = compare_steps(first.metrics, second.metrics)
    console = console_for_tables()
    for table in [_keys(first, second), *_steps(found)]:
        if isinstance(table, str):
            console.print(printable(table), soft_wrap=True, markup=False)
        else:
            console.print(table)
        console.print()
    console.print(verdict(found), soft_wrap=True, markup=False)
    return 0 if found.equal else 1


def compare_steps(first: Path, second: Path) -> Comparison:
    """The steps of two metrics files, read once and side by side."""
    found = Comparison()
    alone = [0, 0]
    for one, other in _pairs(first, second):
        if one is None or other is None:
            alone[one is None] += 1
            continue
        found.common += 1
        found.last_common = one["step"]
        for name, apart in found.metrics.items():
            if name in one and name in other:
                apart.add(one["step"], one[name], other[name])
    found.only = (alone[0], alone[1])
    return found


def _pairs(first: Path, second: Path) -> Iterator[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """Lines of the same step; None for a step that one file does not have."""
    ones, others = _rising(first), _rising(second)
    one, other = next(ones, None), next(others, None)
    while one is not None or other is not None:
        if other is None or (one is not None and one["step"] < other["step"]):
            yield one, None
            one = next(ones, None)
        elif one is None or other["step"] < one["step"]:
            yield None, other
            other = next(others, None)
        else:
            yield one, other
            one, other = next(ones, None), next(others, None)


def _rising(path: Path) -> Iterator[dict[str, Any]]:
    """The steps of a file, without those that a damaged one repeats."""
    last = None
    for step in steps(path):
        if last is None or step["step"] > last:
            last = step["step"]
            yield step


def relative_difference(one: Any, other: Any) -> float:
    """|one - other| / |one|; infinite where one of them is not finite (null in the file) or the first is zero."""
    if one is None or other is None or one == 0:
        return float("inf")
    return abs(one - other) / abs(one)


def verdict(found: Comparison) -> str:
    """The last line."""
    more = [
        f"{count:,} steps are in {which} only" for count, which in zip(found.only, ("A", "B"), strict=True) if count
    ]
    rest = "".join(f"; {text}" for text in more)
    if not found.common:
        return f"no step is in both runs{rest}"
    if found.equal:
        return f"equal to the last bit in {found.common:,} common steps, to step {found.last_common:,}{rest}"
    apart = found.first
    assert apart is not None and apart.first is not None
    step, one, other = apart.first
    by = relative_difference(one, other)
    return (
        f"first difference: {apart.metric} in step {step:,}: {_number(one)} and {_number(other)}"
        f" ({by:.1e} relative), of {found.common:,} common steps{rest}"
    )


def _keys(first: RunDirectory, second: RunDirectory) -> Table | str:
    one, other = read_config(first), read_config(second)
    changed = [
        (key, kind, lookup(one, key), lookup(other, key))
        for key, kind in kinds().items()
        if key not in _OWN and lookup(one, key) != lookup(other, key)
    ]
    names = f"A  {first.path}\nB  {second.path}\n"
    if not changed:
        return f"{names}\nthe configs are the same, but for the runs' names and places"
    table = Table("key", "kind", "A", "B", box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.title = Text(printable(names))
    for key, kind, *values in changed:
        table.add_row(key, kind, *(Text(printable(_short(value))) for value in values))
    return table


def _steps(found: Comparison) -> list[Table]:
    differing = [apart for apart in found.metrics.values() if apart.first is not None]
    if not differing:
        return []
    right = [
        Column(name, justify="right", no_wrap=True)
        for name in ("first in step", "A", "B", "steps", "largest", "in step")
    ]
    table = Table("metric", *right, box=None, pad_edge=False, header_style="bold")
    for apart in differing:
        assert apart.first is not None
        step, one, other = apart.first
        table.add_row(
            apart.metric, f"{step:,}", _number(one), _number(other), f"{apart.differing:,}", f"{apart.worst:.1e}",
            f"{apart.worst_step:,}",
        )  # fmt: skip
    return [table]


def _number(value: Any) -> str:
    return "not finite" if value is None else repr(value)


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
