"""`stoker profile`: where the time of the traced steps of a run goes, and what would help.

`trace`     reads a file of torch's profiler piece by piece
`measure`   the figures of one rank
`advice`    causes, by rule, and the setting that helps
`show`      tables for a terminal, and JSON
"""

from __future__ import annotations

import json
from pathlib import Path

from stoker.conf.printable import printable
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.values import ConfigError
from stoker.launch.inspect import run_at
from stoker.launch.profile.advice import findings
from stoker.launch.profile.measure import RankProfile, measure
from stoker.launch.profile.show import Profile, as_json, print_profile
from stoker.launch.profile.trace import read_trace

_HOW = "profile.steps=[10,13] in a start traces steps 10 to 13"


def profile(path: str, attempt: int | None, rank: int | None, form: str) -> int:
    """Print the profile of a run's traces in `form` (text or json).

    `attempt`: default the newest that was traced. `rank`: the one whose operators, modules and collectives are shown,
    by default that which works longest. Raises ConfigError where nothing was traced, and for a trace that is damaged.
    """
    run = run_at(path)
    traced = _traced(run)
    if not traced:
        raise ConfigError(f"{run.path} has no traces: {_HOW}")
    number = max(traced) if attempt is None else attempt
    if number not in traced:
        raise ConfigError(f"attempt {number} of {run.path} has no traces; {_listed('attempts', list(traced))} have")
    if rank is not None and rank not in traced[number]:
        raise ConfigError(f"attempt {number} has no trace of rank {rank}; {_listed('ranks', traced[number])} have")
    ranks = [_measured(run.trace(number, each), each) for each in traced[number]]
    shown = next((each for each in ranks if each.rank == rank), max(ranks, key=lambda each: each.work_seconds))
    made = Profile(run.path, number, ranks, shown, findings(ranks, read_config(run)))
    if form == "json":
        print(json.dumps(as_json(made), allow_nan=False))
    else:
        print_profile(made)
    return 0


def _traced(run: RunDirectory) -> dict[int, list[int]]:
    """The ranks that have a trace, by attempt, oldest first."""
    found: dict[int, list[int]] = {}
    for file in run.traces():
        attempt, rank = file.parent.name.removeprefix("attempt-"), file.name.removeprefix("rank-").partition(".")[0]
        if attempt.isdigit() and rank.isdigit():
            found.setdefault(int(attempt), []).append(int(rank))
    return {attempt: sorted(found[attempt]) for attempt in sorted(found)}


def _measured(file: Path, rank: int) -> RankProfile:
    try:
        return measure(read_trace(file), rank)
    except ValueError as error:
        text = str(error) if str(file) in str(error) else f"{file}: {error}"
        raise ConfigError(f"{printable(text)}; remove the file to profile the other ranks") from error


def _listed(what: str, numbers: list[int]) -> str:
    return f"{what} {', '.join(map(str, numbers[:10]))}{' and more' if len(numbers) > 10 else ''}"
