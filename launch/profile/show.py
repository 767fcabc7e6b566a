"""A profile as tables for a terminal, and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from stoker.conf.printable import printable
from stoker.launch.inspect import console_for_tables
from stoker.launch.profile.advice import Finding, alike, sentence
from stoker.launch.profile.measure import RankProfile
from stoker.trainer.report.breakdown import PREFIX, RANGES
from stoker.trainer.report.progress import size

PHASES = tuple(name.removeprefix(PREFIX) for name in RANGES)
MOST = 12  # rows of a table
MOST_RANKS = 16
_NAME = 60  # characters of a kernel's name


@dataclass(frozen=True)
class Profile:
    """All that was measured. `shown` is the rank of `ranks` whose details are shown."""

    run: Path
    attempt: int
    ranks: list[RankProfile]
    shown: RankProfile
    findings: list[Finding]


def print_profile(profile: Profile) -> None:
    """Print the advice, then the tables."""
    console, shown = console_for_tables(), profile.shown
    steps = shown.steps
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    ranks = "1 rank" if len(profile.ranks) == 1 else f"{len(profile.ranks)} ranks"
    head = f"{profile.run}: {span} of attempt {profile.attempt}, {ranks} on {'GPUs' if shown.on_gpu else 'CPUs'}"
    lines = [head, "", sentence(profile.findings[0])]
    lines += [f"also: {sentence(finding)}" for finding in profile.findings[1:]]
    for line in lines:
        console.print(printable(line), soft_wrap=True, markup=False)
    for table in tables(profile):
        if table.row_count:
            console.print()
            console.print(table)


def tables(profile: Profile) -> list[Table]:
    """Of all ranks, then of the one shown; means over the traced steps."""
    rank = profile.shown
    return [
        _ranks(profile),
        _operators(rank),
        _modules(rank),
        _collectives(rank),
        _copies(rank),
        _memory(rank),
    ]


def _table(title: str, names: Iterable[str], *, texts: int = 1) -> Table:
    """The first `texts` columns hold text, the others numbers."""
    columns = [
        Column(name, justify="left" if place < texts else "right", no_wrap=True) for place, name in enumerate(names)
    ]
    heading = Text(title, no_wrap=True, overflow="ignore")
    style = {"title_justify": "left", "title_style": "bold", "header_style": "bold"}
    return Table(*columns, title=heading, box=None, pad_edge=False, **style)  # type: ignore[arg-type]


def _ranks(profile: Profile) -> Table:
    """The ranks that work longest, in the order of ranks."""
    most = sorted(profile.ranks, key=lambda rank: -rank.work_seconds)[:MOST_RANKS]
    left_out = f", the {len(most)} of {len(profile.ranks):,} ranks that work longest" if most != profile.ranks else ""
    title = f"Seconds of a step{left_out if len(most) < len(profile.ranks) else ''}"
    names = ["rank", "step", "work", *PHASES, "communication", "bubble", "saves", "idle"]
    table = _table(title, names, texts=0)
    for rank in sorted(most, key=lambda rank: rank.rank):
        phases = [_seconds(rank.phases.get(phase)) for phase in PHASES]
        waiting = (rank.exposed_seconds, rank.bubble_seconds, rank.checkpoint_seconds, rank.idle_seconds)
        rest = [_seconds(value) for value in waiting]
        table.add_row(
            str(rank.rank),
            _seconds(rank.step_seconds),
            _seconds(rank.work_seconds),
            *phases,
            *rest,
            style="bold" if rank is profile.shown and len(profile.ranks) > 1 else None,
        )
    return table


def _operators(rank: RankProfile) -> Table:
    what = "Kernels" if rank.on_gpu else "Operators"
    table = _table(f"{what} of rank {rank.rank}", ["", "calls", "seconds", "of the step"])
    for name, calls, seconds in rank.top[:MOST]:
        table.add_row(_named(name), f"{calls:,.0f}", _seconds(seconds), _share(seconds, rank))
    return table


def _modules(rank: RankProfile) -> Table:
    """Modules of the same name in all layers together, with the one of them that takes longest."""
    names = ["", "count", "forward", "backward", "again", "of the step", "longest", "seconds"]
    table = _table(f"Modules of rank {rank.rank}, own seconds", names)
    groups: dict[str, dict[str, list[float]]] = {}
    for name, seconds in rank.modules.items():
        groups.setdefault(alike(name), {})[name] = seconds
    ordered = sorted(groups.items(), key=lambda each: -sum(map(sum, each[1].values())))
    for name, group in ordered[:MOST]:
        sums = [sum(values) for values in zip(*group.values(), strict=True)]
        longest = max(group, key=lambda one: sum(group[one]))
        more = [_named(longest), _seconds(sum(group[longest]))] if len(group) > 1 else ["", ""]
        table.add_row(_named(name), str(len(group)), *map(_seconds, sums), _share(sum(sums), rank), *more)
    return table


def _collectives(rank: RankProfile) -> Table:
    names = ["", "group", "ranks", "calls", "seconds", "exposed", "of the step"]
    table = _table(f"Collectives of rank {rank.rank}", names, texts=2)
    for one in rank.collectives[:MOST]:
        counts = [str(one.ranks or ""), f"{one.count:,.0f}", _seconds(one.seconds), _seconds(one.exposed_seconds)]
        table.add_row(_named(one.kind), _named(one.group), *counts, _share(one.exposed_seconds, rank))
    return table


def _copies(rank: RankProfile) -> Table:
    table = _table(f"Copies of rank {rank.rank}", ["", "count", "seconds", "bytes"])
    for direction, (count, seconds, copied) in sorted(rank.copies.items()):
        words = {"HtoD": "host to device", "DtoH": "device to host", "DtoD": "on the device"}
        table.add_row(_named(words.get(direction, direction)), f"{count:,.0f}", _seconds(seconds), size(copied))
    return table


def _memory(rank: RankProfile) -> Table:
    known = "at the peak" if "peak" in rank.memory else "without the peak, which only GPUs count"
    table = _table(f"Memory of rank {rank.rank}, {known}", ["", "bytes"])
    for name, count in memory_of(rank).items():
        table.add_row(_named(name), size(count))
    return table


def memory_of(rank: RankProfile) -> dict[str, int]:
    """Bytes by category; where the peak is known, what is left of it too."""
    known = {name: count for name, count in rank.memory.items() if name != "peak"}
    if "peak" not in rank.memory:
        return known
    rest = max(0, rank.memory["peak"] - sum(known.values()))
    return {**known, "activations, gradients, and all else": rest, "peak": rank.memory["peak"]}


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _share(seconds: float, rank: RankProfile) -> str:
    return f"{seconds / rank.step_seconds:.1%}" if rank.step_seconds else ""


def _named(name: str) -> Text:
    """Text of a file, as it is: no markup of rich's."""
    shown = printable(name)
    return Text(shown if len(shown) <= _NAME else f"{shown[: _NAME - 3]}...")


def as_json(profile: Profile) -> dict[str, Any]:
    """Everything, with the advice first. Seconds are means over the traced steps."""
    return {
        "run": str(profile.run),
        "attempt": profile.attempt,
        "advice": sentence(profile.findings[0]),
        "findings": [dataclasses.asdict(finding) for finding in profile.findings],
        "slowest_rank": max(profile.ranks, key=lambda rank: rank.work_seconds).rank,
        "ranks": [_rank_as_json(rank) for rank in profile.ranks],
    }


def _rank_as_json(rank: RankProfile) -> dict[str, Any]:
    return {
        **dataclasses.asdict(rank),
        "data_seconds": rank.data_seconds,
        "work_seconds": rank.work_seconds,
        "top": [{"name": name, "calls": calls, "seconds": seconds} for name, calls, seconds in rank.top],
        "modules": {
            name: dict(zip(("forward", "backward", "recomputed"), seconds, strict=True))
            for name, seconds in rank.modules.items()
        },
        "copies": {
            direction: dict(zip(("count", "seconds", "bytes"), values, strict=True))
            for direction, values in rank.copies.items()
        },
        "memory": memory_of(rank),
    }
