"""`python -m stoker.launch.reference FOLDER`: every key and every command, as Markdown, from the code of each."""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.conf import model_schema, schema
from stoker.conf.limits import LIMITS
from stoker.conf.schema import Config, leaves, lookup
from stoker.conf.values import expected


@dataclass(frozen=True)
class Key:
    """A key of the config."""

    name: str  # dotted
    type: str  # in words
    default: str
    kind: str  # free | maths | fixed
    meaning: str  # with its unit
    limit: str  # completes "must be ..."; empty: of its type only


def keys() -> list[Key]:
    """All keys, in the order of the schema."""
    comments, limits = _comments(), {limit.key: limit.rule for limit in LIMITS}
    owners, defaults = dict(_sections()), Config()
    found = []
    for name, field, hint in leaves():
        section, _, last = name.rpartition(".")
        default = lookup(defaults, name)
        meaning = comments[owners[section].__name__, last]
        kind = field.metadata["kind"]
        found.append(Key(name, expected(hint), _shown(default), kind, meaning, limits.get(name, "")))
    return found


def keys_markdown() -> str:
    """A table for each section."""
    lines = [
        "# Every key",
        "",
        "*free* keys may change when a run is resumed, *maths* keys need `run.change=true`, *fixed* keys never change.",
        "",
    ]
    section: str | None = None
    for key in keys():
        if key.name.rpartition(".")[0] != section:
            section = key.name.rpartition(".")[0]
            title = f"`{section}`" if section else "Top level"
            lines += [
                "",
                f"## {title}",
                "",
                "| key | type | default | kind | meaning |",
                "| --- | --- | --- | --- | --- |",
            ]
        meaning = key.meaning + (f" (must be {key.limit})" if key.limit else "")
        cells = (f"`{key.name}`", key.type, f"`{key.default}`", key.kind, meaning)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join([*lines, ""])


def commands_markdown(parser: argparse.ArgumentParser) -> str:
    """The help of each command, and of those below them."""
    lines = ["# Every command", ""]
    for name, command in _commands(parser, "stoker"):
        lines += [f"## {name}", "", "```text", command.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def _commands(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield f"{name} {word}", command
                yield from _commands(command, f"{name} {word}")


def _sections(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, type]]:
    """The dataclass of each section, by its dotted name."""
    yield prefix, kind
    for name, hint in typing.get_type_hints(kind).items():
        if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
            yield from _sections(hint, f"{prefix}.{name}".lstrip("."))


def _comments() -> dict[tuple[str, str], str]:
    """The comment behind each field of the schema, by class and field."""
    found = {}
    for module in (schema, model_schema):
        source = inspect.getsource(module)
        lines = source.splitlines()
        for node in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and field.end_lineno is not None:
                    _, _, comment = lines[field.end_lineno - 1].partition("  # ")
                    found[node.name, ast.unparse(field.target)] = comment
    return found


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(folder: str) -> int:
    """Write keys.md and commands.md into `folder`."""
    from stoker.launch.cli import parser

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / "keys.md").write_text(keys_markdown())
    (target / "commands.md").write_text(commands_markdown(parser()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
