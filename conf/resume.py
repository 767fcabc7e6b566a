"""What a resumed run computes: its stored config plus the overrides given now, and which of them are allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stoker.conf.compose import compose
from stoker.conf.lasting import PER_START, lasting
from stoker.conf.overrides import parse
from stoker.conf.schema import Config, from_dict, kinds, lookup, to_dict
from stoker.conf.values import ConfigError


@dataclass(frozen=True)
class Change:
    """A key whose value differs from the stored one."""

    key: str
    old: Any
    new: Any
    kind: str  # free | maths | fixed

    def __str__(self) -> str:
        old, new = ("null" if value is None else value for value in (self.old, self.new))
        return f"{self.key}: {old} -> {new}"


def merge(stored: Config, overrides: Sequence[str]) -> tuple[Config, list[Change]]:
    """`stored` with `overrides` applied, and the keys that now differ, in the order of the schema.

    `optim=sgd` replaces the whole node by the one a new run would get; `optim.lr=3e-4` sets the one key. A pinned
    `schedule.total_steps` stays unless it is set by number. Raises ConfigError for a wrong override; `check_changes`
    decides whether the changes are allowed.
    """
    new_run = to_dict(compose(overrides))
    values = to_dict(lasting(stored))
    checked = [parse(override) for override in overrides]
    for override in checked:
        if override.group:
            values[override.key] = new_run[override.key]
    for override in checked:
        if not override.group:
            _copy(override.key.split("."), new_run, values)
    if values["schedule"]["total_steps"] is None:
        values["schedule"]["total_steps"] = stored.schedule.total_steps
    config = from_dict(values)
    changes = [
        Change(key, lookup(stored, key), lookup(config, key), kind)
        for key, kind in kinds().items()
        if key not in PER_START and lookup(stored, key) != lookup(config, key)
    ]
    return config, changes


def check_changes(changes: Sequence[Change], allow: bool) -> None:
    """Raises ConfigError when a fixed key changed, or a key of the run's numbers without `allow` (`run.change`)."""
    fixed = [change for change in changes if change.kind == "fixed"]
    maths = [change for change in changes if change.kind == "maths"]
    lines = []
    if fixed:
        lines += ["these keys are fixed for the life of a run; start another run:", *_indented(fixed)]
    if maths and not allow:
        lines += ["these keys change what the run computes; run.change=true allows it:", *_indented(maths)]
    if lines:
        raise ConfigError("\n".join(lines))


def pin(config: Config) -> Config:
    """The config of a first start: defaults that depend on it, and must outlive it, written out."""
    if config.schedule.total_steps is not None:
        return config
    return dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, total_steps=config.steps))


def _copy(path: list[str], source: dict[str, Any], target: dict[str, Any]) -> None:
    for name in path[:-1]:
        source, target = source[name], target.setdefault(name, {})
    target[path[-1]] = source[path[-1]]


def _indented(changes: Sequence[Change]) -> list[str]:
    return [f"  {change}" for change in changes]
