"""Settings in files of the user's own, read into the KEY=VALUE words that a command line could have given.

    --config FILE.yaml             keys of ours, nested or dotted; `defaults: [{model: small}]` chooses from groups
    experiment=NAME                the same, from experiment/NAME.yaml below a folder of groups
    model=NAME (any group)         model/NAME.yaml below a folder of groups, where NAME is none of Stoker's choices
    --config-dir DIR               a folder of groups, before `conf` in the working directory
    parallel.deepspeed=FILE.json   settings of DeepSpeed (`stoker.conf.deepspeed_file`)

A value means what the same text means on the command line (`lr: 3e-4` is a number, `time: 24:00:00` is text); in quotes
it is text. The words of a command line win over those of files. What `expand` returns names no file that a later start
would have to find again but those of groups, by absolute paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

from stoker.conf.deepspeed_file import translate
from stoker.conf.overrides import SECTIONS, choices, parse, quoted, quoted_value, unknown_choice
from stoker.conf.reasons import reason
from stoker.conf.schema import GROUPS
from stoker.conf.targets import run_around
from stoker.conf.values import ConfigError

EXPERIMENT = "experiment"


def expand(words: Sequence[str], tell: Callable[[str], None] = lambda _: None) -> list[str]:
    """`words` without files: first what files give, then the rest, which wins. What has no files comes back as it was.

    `tell` takes a line for each setting of DeepSpeed's that is translated. Raises ConfigError, naming file and line,
    for a file that cannot be read or says what no config can say.
    """
    files, folders, experiments, rest = _sorted_out(words)
    found = [word for file in files for word in settings_in(_readable(Path(file).expanduser()))]
    for name in experiments:
        found += settings_in(_of_group(EXPERIMENT, name, folders))
    given = {_key(word) for word in rest}
    kept = {_key(word): word for word in found if _key(word) not in given}  # of two files the later wins
    return translate([_located(word, folders) for word in [*kept.values(), *rest]], tell)


def settings_in(path: Path, group: str | None = None) -> list[str]:
    """The settings of a file, in its order. With `group` it is a choice of that group, whose keys are below it.

    Raises ConfigError.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {reason(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: expected keys with values, such as steps: 1000")
    return list(_settings(node, group or "", path))


def group_folders(more: Sequence[str] = ()) -> list[Path]:
    """Where groups of the user's own are looked for: the folders given, then `conf` in the working directory."""
    return [Path(folder).expanduser().absolute() for folder in (*more, "conf")]


def own_choices(group: str, folders: Sequence[Path]) -> list[str]:
    """The names of the user's files of a group, without those that Stoker has itself."""
    taken = choices(group) if group in GROUPS else []
    names = {
        str(file.relative_to(folder / group).with_suffix(""))
        for folder in folders
        for file in (folder / group).rglob("*.yaml")
    }
    return sorted(names.difference(taken))


def _sorted_out(words: Sequence[str]) -> tuple[list[str], list[Path], list[str], list[str]]:
    """Files, folders of groups, experiments, and the other words."""
    files: list[str] = []
    folders: list[str] = []
    experiments: list[str] = []
    rest: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name in ("--config", "--config-dir"):
            value = value if equals else next(left, "")
            if not value:
                raise ConfigError(f"{name} needs a {'file' if name == '--config' else 'folder'} behind it")
            (files if name == "--config" else folders).append(value)
        elif name.lstrip("+") == EXPERIMENT and equals:
            experiments.append(value)
        else:
            rest.append(word)
    for folder in folders:
        if not Path(folder).expanduser().is_dir():
            raise ConfigError(f"--config-dir {folder}: there is no such folder")
    return files, group_folders(folders), experiments, rest


def _located(word: str, folders: Sequence[Path]) -> str:
    """`model=mine` with the file that this is, where `mine` is a choice of the user's own."""
    key, name = _key(word), word.partition("=")[2]
    if key not in GROUPS or name in choices(key) or Path(name).is_absolute():
        return word
    path = _of_group(key, name, folders)
    settings_in(path, key)  # what is wrong in it is said with file and line
    return f"{key}={path}"


def _of_group(group: str, name: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        path = folder / group / f"{name}.yaml"
        if path.is_file() and ".." not in Path(name).parts:
            return _readable(path)
    there = own_choices(group, folders)
    if group in GROUPS:
        raise ConfigError(unknown_choice(group, name, there))
    places = " or ".join(str(folder / group) for folder in folders)
    known = f"; there are {', '.join(there)}" if there else ""
    raise ConfigError(f"{group}={name}: there is no {name}.yaml in {places}{known}")


def _readable(path: Path) -> Path:
    """Raises ConfigError for a file of a run directory: somebody else may have put it there, with code to import."""
    run = run_around(path)
    if run is not None:
        raise ConfigError(
            f"{path} lies in the run directory {run}: run.dir={run} goes on with that run; to begin another one with "
            "its settings, copy the file to a folder of your own"
        )
    return path


def _settings(node: yaml.MappingNode, prefix: str, path: Path) -> Iterator[str]:
    for name_node, value in node.value:
        name = name_node.value if isinstance(name_node, yaml.ScalarNode) else "?"
        if name == "defaults" and not prefix:
            yield from _chosen(value, path)
            continue
        if name == "defaults" and prefix in GROUPS:
            continue  # of a choice of a group: Hydra reads it
        key = f"{prefix}.{name}" if prefix else name
        if key in SECTIONS and isinstance(value, yaml.MappingNode):
            yield from _settings(value, key, path)
        else:
            yield _checked(_word(key, value), path, name_node)


def _chosen(node: yaml.Node, path: Path) -> Iterator[str]:
    """What a list of defaults chooses: `- model: small`, or as in Hydra's experiments `- override /model: small`."""
    for entry in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if isinstance(entry, yaml.ScalarNode) and entry.value == "_self_":
            continue
        pairs = entry.value if isinstance(entry, yaml.MappingNode) else []
        if len(pairs) != 1 or not all(isinstance(part, yaml.ScalarNode) for part in pairs[0]):
            raise ConfigError(f"{_place(path, entry)}: expected a choice from a group, such as - model: small")
        group, name = (part.value for part in pairs[0])
        group = group.removeprefix("override ").strip().lstrip("/")
        if group not in GROUPS:
            raise ConfigError(f"{_place(path, entry)}: {group!r} is none of the groups {', '.join(GROUPS)}")
        yield f"{group}={name}"


def _word(key: str, node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        if node.style is None:
            return f"{key}={'null' if node.value == '~' or not node.value else node.value}"
        word = f"{key}={node.value}"
        if key in GROUPS or _is_text(word, node.value):
            return word
    return f"{key}={_spelled(node)}"


def _is_text(word: str, text: str) -> bool:
    try:
        return parse(word).value == text
    except ConfigError:
        return False


def _spelled(node: yaml.Node) -> str:
    """A value in the grammar of overrides."""
    if isinstance(node, yaml.MappingNode):
        return "{" + ",".join(f"{_spelled(name)}:{_spelled(value)}" for name, value in node.value) + "}"
    if isinstance(node, yaml.SequenceNode):
        return "[" + ",".join(map(_spelled, node.value)) + "]"
    assert isinstance(node, yaml.ScalarNode)
    if node.style is None:
        return quoted_value("null" if node.value == "~" or not node.value else node.value)
    return quoted(node.value)


def _checked(word: str, path: Path, node: yaml.Node) -> str:
    try:
        parse(word)
    except ConfigError as error:
        if _key(word) not in GROUPS:  # whose choices may be the user's own, which are looked for later
            raise ConfigError(f"{_place(path, node)}: {error}") from None
    return word


def _place(path: Path, node: yaml.Node) -> str:
    return f"{path}, line {node.start_mark.line + 1}"


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")
