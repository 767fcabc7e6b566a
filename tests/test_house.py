"""The rules of the house: floors, private names, file sizes, no pickle near a checkpoint, units in the schema."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("conf", "parallel", "data", "models", "checkpoint", "trainer", "launch")  # bottom first
NAMELESS = {"utils.py", "helpers.py", "common.py", "misc.py"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
MOST_LINES = 400


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[int, str, str | None]]:
    """Every import, at any depth: line, module, and the imported name where there is one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name, None) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: rooms are imported by their absolute name"
            yield from ((node.lineno, node.module or "", name.name) for name in node.names)


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def room_of(module: str) -> str | None:
    room = module.partition(".")[0]
    return room if room in FLOORS else None


def upward_imports(room: str, source: str) -> list[str]:
    """Imports of a room that stands above `room`."""
    above = FLOORS[FLOORS.index(room) + 1 :]
    return [f"line {line}: {module}" for line, module, _ in imports(ast.parse(source)) if room_of(module) in above]


def private_uses(room: str, source: str) -> list[str]:
    """Private names of other rooms: imported, or reached through an imported module or name."""
    tree = ast.parse(source)
    found, foreign = [], set()
    for line, module, name in imports(tree):
        if room_of(module) in (None, room):
            continue
        if any(is_private(part) for part in [*module.split("."), name or ""]):
            found.append(f"line {line}: {module} {name or ''}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = node.module or "" if isinstance(node, ast.ImportFrom) else alias.name
                if room_of(module) not in (None, room):
                    foreign.add(alias.asname or alias.name.partition(".")[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id in foreign:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def pickles(source: str) -> list[str]:
    """Imports of modules that unpickle, and the torch functions that do."""
    tree = ast.parse(source)
    found = []
    for line, module, name in imports(tree):
        if PICKLES & {*module.split("."), name} or (module == "torch" and name in ("save", "load")):
            found.append(f"line {line}: {module} {name or ''}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.save", "torch.load"):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def keys_without_comment(source: str) -> list[str]:
    """Fields of dataclasses, sections aside, whose line has no comment."""
    tree, lines = ast.parse(source), source.splitlines()
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return [
        f"{name}.{ast.unparse(field.target)}"
        for name, node in classes.items()
        for field in node.body
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation) not in classes
        if "# " not in lines[field.lineno - 1]
    ]


IN_ROOMS = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in files(*FLOORS)]
EVERYWHERE = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in files(*FLOORS, "tests", "benchmarks")]


@pytest.mark.parametrize("path", IN_ROOMS)
def test_floors_only_go_down(path):
    assert upward_imports(path.relative_to(ROOT).parts[0], path.read_text()) == []


@pytest.mark.parametrize("path", IN_ROOMS)
def test_no_room_uses_private_names_of_another(path):
    assert private_uses(path.relative_to(ROOT).parts[0], path.read_text()) == []


@pytest.mark.parametrize("path", EVERYWHERE)
def test_files_are_short_and_named_after_what_they_hold(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES
    assert path.name not in NAMELESS


@pytest.mark.parametrize("path", files("benchmarks"), ids=lambda path: path.name)
def test_no_benchmark_hides_a_room(path):
    """`python benchmarks/NAME.py` puts benchmarks/ before the rooms on the import path."""
    assert path.stem not in FLOORS


@pytest.mark.parametrize("path", files("checkpoint"), ids=lambda path: path.name)
def test_checkpoints_never_meet_pickle(path):
    assert pickles(path.read_text()) == []


def test_every_key_says_its_unit():
    assert keys_without_comment((ROOT / "conf" / "schema.py").read_text()) == []


@pytest.mark.parametrize("room", FLOORS)
def test_every_room_opens_with_an_essay(room):
    essays = [ast.get_docstring(ast.parse(path.read_text())) or "" for path in (ROOT / room).glob("*.py")]
    assert any(len(essay.splitlines()) >= 4 for essay in essays)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("conf", "import parallel.layout"),
        ("conf", "from parallel import layout"),
        ("data", "def f():\n    from trainer.loop import fit"),
        ("data", "if True:\n    import conf, models.decoder as d"),
        ("trainer", "class A:\n    def f(self):\n        import launch"),
    ],
)
def test_an_import_that_goes_up_is_caught(room, source):
    assert len(upward_imports(room, source)) == 1


def test_an_import_that_goes_down_or_outside_is_not():
    assert upward_imports("data", "import conf, torch\nfrom parallel.rows import Rows\nimport data.x") == []


@pytest.mark.parametrize(
    "source",
    [
        "from conf.schema import _kind",
        "from conf._x import y",
        "def f():\n    from conf import _secret as fine",
        "from conf import schema\nschema._kind",
        "import conf.schema\nconf.schema._kind(1)",
        "import conf.schema as s\nx = s.Config._y.z",
        "from conf.schema import Config\nConfig._fields",
    ],
)
def test_a_private_name_of_another_room_is_caught(source):
    assert len(private_uses("data", source)) == 1


def test_private_names_of_the_own_room_and_dunders_are_not():
    source = "from data.x import _y\nimport conf, torch\nconf.__file__\ntorch._C\nself._x\nfrom data import z\nz._w"
    assert private_uses("data", source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import save",
        "from multiprocessing.reduction import pickle",
    ],
)
def test_a_pickle_is_caught(source):
    assert len(pickles(source)) == 1


def test_a_key_without_a_comment_is_caught():
    source = "class A:\n    x: int = 1\n    y: int = 2  # steps\nclass B:\n    a: A = free(A)\n"
    assert keys_without_comment(source) == ["A.x"]
