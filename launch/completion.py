"""What can follow a line that begins with `stoker`, for the completion of shells.

The scripts for bash, zsh and fish hand over the line as far as it is typed (`stoker completion --line`) and get one
candidate a line, each of which replaces the whole last word. Keys, choices and commands are those of the schema, the
limits and the parser, so a new key needs nothing here.
"""

from __future__ import annotations

import argparse
import glob
from collections.abc import Iterable
from pathlib import Path

from stoker.conf.files import EXPERIMENT, group_folders, own_choices
from stoker.conf.limits import LIMITS
from stoker.conf.overrides import choices
from stoker.conf.schema import GROUPS, leaves
from stoker.conf.values import options as types_of

_KEYS = {key: hint for key, _, hint in leaves()}
_CHOICES = {limit.key: limit.choices for limit in LIMITS if limit.choices}

# bash cuts words at = and : (COMP_WORDBREAKS), and wants what follows the cut.
_BASH = """\
_stoker() {
    local candidate typed="${COMP_LINE:0:COMP_POINT}" before=""
    local word="${typed##* }"
    [[ $COMP_WORDBREAKS == *=* ]] && before="${word%"${word##*[=:]}"}"
    COMPREPLY=()
    while IFS= read -r candidate; do
        [[ $candidate == *[=./] ]] || candidate+=" "
        COMPREPLY+=("${candidate#"$before"}")
    done < <("$1" completion --line "$typed" 2>/dev/null)
}
complete -o nospace -o default -F _stoker stoker
"""
_ZSH = """\
_stoker() {
    local -a found open closed
    found=("${(@f)$(${words[1]} completion --line "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    found=(${found:#})
    (( $#found )) || { compset -P '*='; _files; return }
    open=(${(M)found:#*[=./]})
    closed=(${found:#*[=./]})
    (( $#open )) && compadd -Q -S '' -- $open
    (( $#closed )) && compadd -Q -- $closed
    return 0
}
compdef _stoker stoker
"""
_FISH = """\
complete -c stoker -f -a '(stoker completion --line (commandline -cp) 2>/dev/null)'
complete -c stoker -F -n 'test -z "$(stoker completion --line (commandline -cp) 2>/dev/null)"'
"""


def script(shell: str) -> str:
    """The script that makes `shell` (bash, zsh, fish) complete `stoker`."""
    return {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}[shell]


def candidates(parser: argparse.ArgumentParser, line: str) -> list[str]:
    """What the last word of `line` can become; it is empty after a space. Where files are wanted there are none."""
    *before, word = line.split(" ")
    before = [done for done in before[1:] if done]
    if before[:1] == ["help"]:
        del before[0]
    value: argparse.Action | None = None  # the option whose value comes next
    places = 0  # of the words that are no options
    for done in before:
        commands = _commands(parser)
        if value is not None:
            value = None
        elif done in commands:
            parser, places = commands[done], 0
        elif done in parser._option_string_actions:
            action = parser._option_string_actions[done]
            value = action if action.nargs != 0 else None
        else:
            places += 1
    if value is not None:
        return _beginning(word, value.choices or ())
    if word.startswith("-"):
        return _beginning(word, parser._option_string_actions)
    if commands := _commands(parser):
        return _beginning(word, commands)
    positional = [action for action in parser._actions if not action.option_strings]
    if not positional:
        return []
    place = positional[min(places, len(positional) - 1)]
    if place.dest == "overrides":
        return _settings(word)
    if place.dest == "run":
        return _runs(word) if places == 0 else []
    return _beginning(word, place.choices or ())


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def _beginning(word: str, known: Iterable[str]) -> list[str]:
    return sorted(name for name in known if name.startswith(word))


def _settings(word: str) -> list[str]:
    plus = "+" if word.startswith("+") else ""
    key, equals, value = word.removeprefix(plus).partition("=")
    if not equals:
        return [plus + found for found in _keys(key)]
    values = _runs(value) if key == "run.dir" else _beginning(value, _values(key))
    return [f"{plus}{key}={found}" for found in values]


def _keys(typed: str) -> list[str]:
    """Keys, as far as the next dot: sections first become `model.`, and then their keys."""
    known = [*_KEYS, *GROUPS, *([EXPERIMENT] if own_choices(EXPERIMENT, group_folders()) else [])]
    found = set()
    for key in known:
        if key.startswith(typed):
            section, dot, _ = key[len(typed) :].partition(".")
            found.add(typed + section + (dot or "="))
    return sorted(found)


def _values(key: str) -> list[str]:
    if key in GROUPS or key == EXPERIMENT:
        return [*(choices(key) if key in GROUPS else []), *own_choices(key, group_folders())]
    if bool in types_of(_KEYS.get(key)):
        return ["true", "false"]
    return list(_CHOICES.get(key, ()))


def _runs(word: str) -> list[str]:
    """Run directories whose path begins with `word`, at most one folder further down."""
    begin = glob.escape(word)
    found = [path for pattern in (f"{begin}*/attempts", f"{begin}*/*/attempts") for path in glob.glob(pattern)]
    return sorted({str(Path(path).parent) for path in found if Path(path).is_dir()})
