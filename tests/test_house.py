"""The rules of the house: floors, circles, private names, file sizes, no pickle, units in the schema."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from stoker.parallel.update import ControlFlag
from stoker.trainer.runtime.process import Phase

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("conf", "parallel", "data", "models", "checkpoint", "trainer", "launch")  # bottom first
NAMELESS = {"utils.py", "helpers.py", "common.py", "misc.py"}
UNPICKLES = ROOT / "launch" / "importing" / "pickled.py"  # foreign checkpoints, by restricted unpicklers
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
MOST_LINES = 400


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    """All nodes, at any depth, with the module before the others."""
    return tuple(ast.walk(ast.parse(source)))


def imports(source: str) -> Iterator[tuple[int, str, str | None]]:
    """Every import, at any depth: line, module, and the imported name where there is one."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name, None) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: modules are imported by their absolute name"
            yield from ((node.lineno, node.module or "", name.name) for name in node.names)


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def room_of(module: str, name: str | None = None) -> str | None:
    """The room of `stoker.ROOM...`; `from stoker import ROOM` names it too."""
    top, *rest = [*module.split("."), *([name] if name else [])]
    return rest[0] if top == "stoker" and rest and rest[0] in FLOORS else None


def bare_imports(source: str) -> list[str]:
    """Imports of a room by a name that a user's own folder may have."""
    found = imports(source)
    return [f"line {line}: {module}" for line, module, _ in found if module.partition(".")[0] in FLOORS]


def upward_imports(room: str, source: str) -> list[str]:
    """Imports of a room above `room`."""
    above = FLOORS[FLOORS.index(room) + 1 :]
    found = imports(source)
    return [f"line {line}: {module} {name or ''}" for line, module, name in found if room_of(module, name) in above]


def private_uses(room: str, source: str) -> list[str]:
    """Private names of other rooms: imported, or reached through an imported module or name."""
    found, foreign = [], set()
    for line, module, name in imports(source):
        if room_of(module, name) in (None, room):
            continue
        if any(is_private(part) for part in [*module.split("."), name or ""]):
            found.append(f"line {line}: {module} {name or ''}")
    for node in nodes(source):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
                if room_of(module) not in (None, room):
                    foreign.add(alias.asname or alias.name)
    for node in nodes(source):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            chain = ast.unparse(node.value)
            if any(chain == name or chain.startswith(f"{name}.") for name in foreign):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def pickles(source: str) -> list[str]:
    """Imports of modules that unpickle, and the torch functions that do."""
    found = []
    for line, module, name in imports(source):
        if PICKLES & {*module.split("."), name} or (module == "torch" and name in ("save", "load")):
            found.append(f"line {line}: {module} {name or ''}")
    for node in nodes(source):
        if not isinstance(node, ast.Attribute | ast.Name):
            continue
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        unpickles = name in ("save", "load") and ast.unparse(node) in ("torch.save", "torch.load")
        if unpickles or _sends_pickles(name):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def _sends_pickles(name: str) -> bool:
    """Whether this is a collective of torch.distributed that exchanges Python objects, as pickles."""
    return name in {f"{verb}_object_list" for verb in ("broadcast", "scatter", "send", "recv")} | {
        "all_gather_object",
        "gather_object",
    }


def keys_without_comment(source: str) -> list[str]:
    """Fields of dataclasses, sections aside, whose line has no comment."""
    lines = source.splitlines()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    return [
        f"{name}.{ast.unparse(field.target)}"
        for name, node in classes.items()
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and not (ast.unparse(field.annotation) in classes or ast.unparse(field.annotation).endswith("Config"))
        if "# " not in lines[field.lineno - 1]
    ]


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which of the modules of `sources` each of them imports, at any depth of its code."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        named = {
            f"{imported}.{name}" if f"{imported}.{name}" in sources else imported
            for _, imported, name in imports(source)
        }
        graph[module] = named & sources.keys() - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other on any path: strongly connected components of more than one."""
    reach = {module: _reachable(graph, module) for module in graph}
    groups = {frozenset(other for other in reach[module] if module in reach[other]) for module in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found, ahead = set(), [start]
    while ahead:
        for module in graph[ahead.pop()]:
            if module not in found:
                found.add(module)
                ahead.append(module)
    return found


STATES = {*ControlFlag, *Phase}  # the two enums in which control flags and phases are declared


def undeclared_states(source: str) -> list[str]:
    """Control flags and phases as text: their values where no other word is meant.

    Some values are words with other uses ("data"). They count in a call of `phase` or `spent`, compared with something
    whose name contains phases or votes, and two or more of them together.
    """
    found = []
    for node in nodes(source):
        if isinstance(node, ast.Constant) and node.value in STATES and "_" in str(node.value):
            found.append(f"line {node.lineno}: {node.value}")
        words = [word for word in _words_of(node) if word in STATES]
        if len(words) > 1 or (words and isinstance(node, ast.Call | ast.Compare)):
            found.append(f"line {getattr(node, 'lineno', 0)}: {', '.join(words)}")
    return found


def _words_of(node: ast.AST) -> list[str]:
    """Text in a place where it may be a state."""
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in ("phase", "spent", "Stamp"):
            inside = node.args
        case ast.Compare(left=left, comparators=right) if _texts([left, *right]) and _is_of_states(node):
            inside = [left, *right]
        case ast.Set() | ast.List() | ast.Tuple():
            inside = node.elts
        case ast.Dict():
            inside = [key for key in node.keys if key is not None]
        case ast.ClassDef():
            inside = [field.value for field in node.body if isinstance(field, ast.Assign)]
        case _:
            inside = []
    return _texts(inside)


def _texts(parts: Iterable[ast.AST]) -> list[str]:
    return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def _is_of_states(node: ast.AST) -> bool:
    return any(word in ast.unparse(node) for word in ("phase", "votes", "flags"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("stoker", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def broken(paths: Iterable[Path], rule: Callable[[str, str], list[str]]) -> list[str]:
    """What `rule(room, source)` finds in each file."""
    found = ((path.relative_to(ROOT), path.read_text()) for path in paths)
    return [f"{path}: {line}" for path, source in found for line in rule(path.parts[0], source)]


def test_rooms_import_rooms_below_them_under_the_name_of_the_package():
    assert broken(files(*FLOORS), upward_imports) == []
    assert broken(files(*FLOORS, "tests", "benchmarks", "stoker"), lambda _, source: bare_imports(source)) == []
    for source in (
        "import stoker.parallel.layout",
        "from stoker import data",
        "def f():\n    from stoker.trainer.loop import fit",
        "class A:\n    def f(self):\n        import stoker.launch",
    ):
        assert len(upward_imports("conf", source)) == 1, source
    assert upward_imports("data", "from stoker import conf\nimport torch\nfrom stoker.parallel.rows import Rows") == []
    assert len(bare_imports("import conf\nfrom data.x import y\nfrom stoker.data import z")) == 2


def test_no_modules_import_each_other():
    graph = import_graph({module_name(path): path.read_text() for path in files(*FLOORS)})
    assert sum(map(len, graph.values())) > len(graph)  # it sees the imports
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_control_flags_and_phases_are_declared_once():
    declared = {ROOT / "parallel" / "update.py", ROOT / "trainer" / "runtime" / "process.py"}
    assert all(undeclared_states(path.read_text()) for path in declared), "it sees the declarations"
    assert broken(set(files(*FLOORS)) - declared, lambda _, source: undeclared_states(source)) == []
    for source in (
        "self.phase(step, 'data')",
        "seconds = phase.spent('data')",
        "if stamp.phase == 'update': pass",
        "if 'stop' in votes: pass",
        "STEADY = ('data', 'update')",
        "BOOKS = {'data': 1, 'save': 2}",
        "class Asked:\n    STOP = 'stop'\n    SAVE = 'save'",
        "found.get('forward_backward')",
    ):
        assert undeclared_states(source), source
    assert undeclared_states("state['data']\naction == 'stop'\nphase(step, Phase.DATA)\n('data', 'down')") == []


def test_no_room_uses_private_names_of_another():
    assert broken(files(*FLOORS), private_uses) == []
    for source in (
        "from stoker.conf.schema import _kind",
        "from stoker.conf._x import y",
        "def f():\n    from stoker.conf import _secret as fine",
        "from stoker.conf import schema\nschema._kind",
        "import stoker.conf.schema\nstoker.conf.schema._kind(1)",
        "import stoker.conf.schema as s\nx = s.Config._y.z",
        "from stoker.conf.schema import Config\nConfig._fields",
    ):
        assert len(private_uses("data", source)) == 1, source
    allowed = "from stoker.data.x import _y\nfrom stoker import conf\nimport torch\nconf.__file__\ntorch._C\nself._x"
    assert private_uses("data", allowed + "\nfrom stoker.data import z\nz._w") == []


def test_nothing_that_is_read_or_received_is_unpickled():
    assert pickles(UNPICKLES.read_text()), "it sees them"
    assert broken(set(files(*FLOORS)) - {UNPICKLES}, lambda _, source: pickles(source)) == []
    for source in (
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import save",
        "from multiprocessing.reduction import pickle",
        "dist.all_gather_object(texts, text, group=group)",
        "from torch.distributed import broadcast_object_list\nbroadcast_object_list(x)",
    ):
        assert len(pickles(source)) == 1, source


def test_files_are_short_and_named_after_what_they_hold():
    everywhere = files(*FLOORS, "tests", "benchmarks", "stoker")
    assert [path.name for path in everywhere if len(path.read_text().splitlines()) > MOST_LINES] == []
    assert [path.name for path in everywhere if path.name in NAMELESS] == []
    for room in FLOORS:
        essays = [ast.get_docstring(ast.parse(path.read_text())) or "" for path in (ROOT / room).glob("*.py")]
        assert any(len(essay.splitlines()) >= 4 for essay in essays), f"no file of {room} explains the room"


def test_every_key_has_a_comment_with_its_unit():
    schema = "\n".join((ROOT / "conf" / file).read_text() for file in ("model_schema.py", "schema.py"))
    assert keys_without_comment(schema) == []
    source = "class A:\n    x: int = 1\n    y: int = 2  # steps\nclass B:\n    a: A = free(A)\n"
    assert keys_without_comment(source) == ["A.x"]
