"""The points of a sweep: settings that differ between its runs, from a grid, at random, or proposed by a program."""

from __future__ import annotations

import itertools
import json
import math
import random
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from stoker.conf.overrides import items_of
from stoker.conf.records import is_sane, parse_json
from stoker.conf.values import ConfigError

Point = tuple[str, ...]  # KEY=VALUE words

MOST_POINTS = 10_000


def divided(words: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The words that all runs have, and for each swept key its words: `optim.lr=1e-3,3e-4` becomes two.

    Commas inside brackets and quotes divide nothing. Raises ConfigError for an empty value.
    """
    fixed, swept = [], []
    for word in words:
        key, equals, text = word.partition("=")
        values = items_of(text) if equals and not word.startswith("--") else [text]
        if len(values) == 1:
            fixed.append(word)
            continue
        if not all(value.strip() for value in values):
            raise ConfigError(f"{word}: one of its values is empty")
        swept.append([f"{key}={value.strip()}" for value in dict.fromkeys(values)])
    return fixed, swept


def grid(swept: Sequence[Sequence[str]]) -> list[Point]:
    """All combinations, the last key changing fastest. Raises ConfigError for more than `MOST_POINTS`."""
    count = math.prod(map(len, swept))
    if count > MOST_POINTS:
        raise ConfigError(f"{count:,} combinations, and a sweep has at most {MOST_POINTS:,}: --random 50 tries some")
    return list(itertools.product(*swept))


def chosen(swept: Sequence[Sequence[str]], number: int, seed: int) -> list[Point]:
    """So many different combinations at random, all of them if there are no more; the same seed gives the same."""
    count = math.prod(map(len, swept))
    places = random.Random(seed).sample(range(count), min(number, count))
    return [_at(swept, place) for place in places]


def _at(swept: Sequence[Sequence[str]], place: int) -> Point:
    words = []
    for values in reversed(swept):
        place, own = divmod(place, len(values))
        words.append(values[own])
    return tuple(reversed(words))


def asked(command: str, results: list[dict[str, Any]]) -> Point | None:
    """The settings that `command` proposes next; None when it proposes no more.

    The program is started for each proposal, without a shell. It gets the results so far on its standard input, a JSON
    list of `{"number": 0, "settings": {"optim.lr": 1e-3}, "value": 2.31, "outcome": "completed"}`, and prints an object
    such as `{"optim.lr": 3e-4}`, or nothing. Raises ConfigError where it fails or prints something else.
    """
    try:
        ended = subprocess.run(
            shlex.split(command), input=json.dumps(results), stdout=subprocess.PIPE, text=True, check=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"--ask {command!r} cannot be started: {error}") from error
    if ended.returncode != 0:
        raise ConfigError(f"--ask {command!r} ended with status {ended.returncode}; its error is above")
    printed = ended.stdout.strip()
    if not printed:
        return None
    try:
        values = parse_json(printed)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not values or not is_sane(values):
        raise ConfigError(
            f'--ask {command!r} printed {printed[:200]!r}: expected a JSON object such as {{"optim.lr": 3e-4}}, or '
            "nothing when there are no more"
        )
    return tuple(f"{key}={_spelled(value)}" for key, value in values.items())


def settings_of(point: Point) -> dict[str, Any]:
    """`point` as an object for the program that proposes: numbers as numbers, all else as text."""
    found: dict[str, Any] = {}
    for word in point:
        key, _, text = word.partition("=")
        try:
            value = parse_json(text)
        except ValueError:
            value = text
        found[key] = value if isinstance(value, int | float) and is_sane(value) else text
    return found


def _spelled(value: Any) -> str:
    """A JSON value as on a command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(_spelled, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_spelled(own)}' for key, own in value.items())}}}"
    return repr(value) if isinstance(value, float) else str(value)
