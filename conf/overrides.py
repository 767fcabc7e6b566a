"""Overrides as a user types them: `KEY=VALUE`, checked against the schema and quoted for Hydra's grammar.

Hydra reads `a,b` as a sweep, `int(3)` as a function, and rejects `s-{000..099}.tar`, `?x=1` and `~/x`. Here a value is
what it looks like: a number, a boolean, null, a list, a dictionary, a quoted string, or else the text itself. For a key
that the schema declares as text it is always the text (`run.name=1e5`), except null and a quoted string.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.conf.peer_names import answer_to
from stoker.conf.schema import GROUPS, leaves
from stoker.conf.values import ConfigError, expected, fits, options

GROUPS_FOLDER = Path(__file__).resolve().parent
_TYPES = {key: hint for key, _, hint in leaves()}
_OPEN = {key for key, hint in _TYPES.items() if dict[str, Any] in options(hint)}  # below these any key goes
SECTIONS = {key.rpartition(".")[0] for key in _TYPES} - {""}
DEEPSPEED = "parallel.deepspeed"  # settings, or the file of them that `stoker.parallel` reads


@dataclass(frozen=True)
class Override:
    """One checked override."""

    key: str  # dotted
    value: Any  # plain value; for a group the name of the choice
    group: bool  # does it choose a file of a group?
    hydra: str  # the same in Hydra's grammar
    folder: Path | None = None  # of groups, where the choice is a file of the user's own


def parse(override: str) -> Override:
    """`override` checked and quoted. Raises ConfigError when the key is unknown or the value does not fit it."""
    typed_key, separator, text = override.partition("=")
    key = typed_key.lstrip("+")
    if override.startswith("-"):
        raise ConfigError(f"{override}: {dashed(override)}")
    if key.startswith("~"):
        raise ConfigError(f"{override}: keys cannot be removed; set the key to null, or to its default")
    if not separator:
        problem = f"{override!r} is not an override: expected KEY=VALUE"
        known = answer_to(override, _accepted)
        raise ConfigError(f"{problem}; {known}" if known else problem)
    if "${" in text:
        raise ConfigError(
            f"{override}: an interpolation would be resolved again by every rank and every restart; write the value"
        )
    if key in GROUPS:
        return _choice(key, text)
    below = next((name for name in _OPEN if key.startswith(f"{name}.")), None)
    _check_key(key, text, below, added=typed_key != key)
    hint = Any if below else _TYPES[key]
    quoted = f"{key}={quoted_value(text, hint)}"
    value = _value(quoted)
    if not fits(value, hint):
        raise ConfigError(f"{key}={text}: expected {expected(hint)}")
    empty = _empty(key, value)
    if empty is not None:
        raise ConfigError(
            f"{empty}= is empty: give a value, or leave {empty} out (is a variable of the shell not set?)"
        )
    return Override(key, value, False, f"++{quoted}" if below or key in _OPEN else quoted)


def quote(override: str) -> str:
    """`override` with its value quoted where Hydra would reject or misread it."""
    key, separator, text = override.partition("=")
    return f"{key}={quoted_value(text, _TYPES.get(key.lstrip('+'), Any))}" if separator else override


def choices(group: str) -> list[str]:
    """The choices of `group=...`: the names of the group's files."""
    return sorted(file.stem for file in (GROUPS_FOLDER / group).glob("*.yaml"))


def closest(word: str, known: list[str]) -> list[str]:
    """`known` with the most similar to `word` first."""
    return sorted(known, key=lambda name: -difflib.SequenceMatcher(None, word, name).ratio())


def _empty(key: str, value: Any) -> str | None:
    """The key of an empty text in `value`, which as a path is the working directory. A user's own keys may be empty."""
    if ".args." in f"{key}." or key.startswith("parallel.deepspeed"):
        return None
    if isinstance(value, dict):
        return next(filter(None, (_empty(f"{key}.{name}", inner) for name, inner in value.items())), None)
    if isinstance(value, list):
        return next(filter(None, (_empty(key, inner) for inner in value)), None)
    return key if value == "" else None


def _choice(group: str, text: str) -> Override:
    """A choice of Stoker's own by its name, one of the user's by the path of its file."""
    known, file = choices(group), Path(text)
    if text in known:
        return Override(group, text, True, f"{group}={text}")
    if not file.is_absolute():
        raise ConfigError(unknown_choice(group, text))
    folder = next((above.parent for above in file.parents if above.name == group), None)
    if folder is None or not file.is_file():
        raise ConfigError(f"{group}={text}: there is no such file in a folder {group}")
    return Override(
        group, text, True, f"{group}={quoted(str(file.relative_to(folder / group).with_suffix('')))}", folder
    )


def unknown_choice(group: str, text: str, own: Sequence[str] = ()) -> str:
    """That a group has no such choice, and those it has; `own`: those of the user."""
    known = ", ".join(closest(text, [*choices(group), *own]))
    return f"unknown {group} {text!r}: choose from {known}, or write conf/{group}/{text}.yaml"


def dashed(option: str) -> str:
    """What to write for an option such as `--steps=5`, `--learning_rate` or `-m`: no command takes it."""
    return answer_to(option, _accepted) or "settings of a run are KEY=VALUE, such as steps=1000"


def names_a_file(override: str) -> bool:
    """Whether this is `parallel.deepspeed=FILE`, rather than settings."""
    key, _, text = override.lstrip("+").partition("=")
    return key == DEEPSPEED and text.strip() not in ("", "null") and not text.lstrip().startswith("{")


def _accepted(override: str) -> bool:
    if names_a_file(override):
        return True
    try:
        parse(override)
    except ConfigError:
        return False
    return True


def _check_key(key: str, text: str, below: str | None, added: bool) -> None:
    if key in _TYPES or below:
        return
    if key in SECTIONS:
        example = next(name for name in _TYPES if name.startswith(f"{key}."))
        raise ConfigError(f"{key!r} is a section: set its keys one by one, such as {example}=...")
    found = _similar(key)
    message = f"unknown key {key!r}"
    if known := answer_to(f"{key}={text}", _accepted):
        message += f": {known}"
    elif found:
        message += f": did you mean {' or '.join(map(repr, found))}?"
    else:
        message += ": `stoker config` prints every key"
    if added:
        message += f" (+ adds keys only below {', '.join(sorted(_OPEN))})"
    raise ConfigError(message)


def _similar(key: str) -> list[str]:
    """Known keys of the same last part, at most three, or else the most similar key or group."""
    last = key.rpartition(".")[2]
    same = [known for known in _TYPES if known.rpartition(".")[2] == last]
    if same:
        return same[:3]

    def ratios(known: str) -> tuple[float, float]:
        pairs = ((key, known), (last, known.rpartition(".")[2]))
        whole, part = (difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)
        return max(whole, _shared_words(key, known)), part

    best = max([*_TYPES, *GROUPS], key=lambda known: sum(ratios(known)))
    return [best] if max(ratios(best)) >= 0.6 else []


def _shared_words(typed: str, known: str) -> float:
    """The share of equal words in two keys, in any order: `micro_batch` and `batch.micro_size`."""
    ours, theirs = (set(re.split(r"[._]", key)) for key in (typed, known))
    return 2 * len(ours & theirs) / (len(ours) + len(theirs))


def _value(quoted: str) -> Any:
    from hydra.errors import HydraException

    try:
        return _parsed(quoted).value()
    except HydraException:  # the value is quoted, so it is the key
        raise ConfigError(f"{quoted}: a key is made of names with dots between them") from None


def quoted_value(text: str, hint: Any = Any) -> str:
    """`text` in quotes if Hydra would take it for something else than it looks where `hint` is declared."""
    if _reads_as_it_looks(text, hint):
        return text
    if text.startswith("[") and text.endswith("]") and str not in options(hint):
        items = "[" + ",".join(quoted_value(item.strip(), Any) for item in _items(text[1:-1])) + "]"
        if _reads_as_it_looks(items, hint):
            return items
    return quoted(text)


def quoted(text: str) -> str:
    """`text` in quotes of Hydra's grammar."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def _reads_as_it_looks(text: str, hint: Any) -> bool:
    from hydra.core.override_parser.types import QuotedString
    from hydra.errors import HydraException

    try:
        parsed = _parsed(f"key={text}")
    except HydraException:
        return False
    value = parsed.value()
    if parsed.is_sweep_override():
        return False
    if isinstance(value, str):
        return value == text or isinstance(parsed._value, QuotedString)
    is_function_call = text.rstrip().endswith(")")
    return not is_function_call and (value is None or str not in options(hint))


def _items(text: str) -> list[str]:
    """`text` split at the commas outside brackets and quotes."""
    items, depth, quote_mark, start = [], 0, "", 0
    for at, letter in enumerate(text):
        if quote_mark:
            quote_mark = "" if letter == quote_mark else quote_mark
        elif letter in "'\"":
            quote_mark = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth == 0:
            items.append(text[start:at])
            start = at + 1
    return [*items, text[start:]]


def _parsed(override: str) -> Any:
    return _parser().parse_override(override)


@functools.cache
def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()
