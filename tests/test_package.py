"""What a user installs: one top-level package, which leaves every other name to its user."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest

from tests.launch.runs import environment, overrides, write_text

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("launch", "trainer", "checkpoint", "models", "data", "parallel", "conf")
MODULES = {
    "hydra-core": "hydra",
    "lm-eval": "lm_eval",
    "mlflow-skinny": "mlflow",
    "pyyaml": "yaml",
}  # of distributions that are not called like what they hold


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        target = folder / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "tree")]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_one_package_whose_rooms_are_real_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("top_level.txt")]
        assert archive.read(metadata).split() == [b"stoker"]
    assert {name.partition("/")[0] for name in names} == {"stoker", metadata.partition("/")[0]}
    for room in ROOMS:
        assert f"stoker/{room}/__init__.py" in names
    assert "stoker/conf/model/tiny.yaml" in names and "stoker/launch/slurm/train.sbatch" in names


def test_the_installed_wheel_imports_beside_packages_called_like_our_rooms(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "site" / "trainer").mkdir()  # as coqui-tts-trainer installs one
    (tmp_path / "site" / "trainer" / "__init__.py").write_text("OTHER = True\n")
    program = f"""
import sys
sys.path = [{str(tmp_path / "site")!r}] + [place for place in sys.path if place != {str(ROOT)!r}]
import stoker, stoker.conf.compose, trainer, importlib.util
assert stoker.__file__.startswith({str(tmp_path)!r}), stoker.__file__
assert trainer.OTHER and stoker.conf.compose.compose(["model=tiny"]).model.name == "tiny"
assert all(importlib.util.find_spec(room) is None for room in {ROOMS!r} if room != "trainer")
"""
    subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, check=True)


def test_an_editable_install_makes_no_room_importable(tmp_path: Path) -> None:
    program = f"import importlib.util as i; assert [r for r in {ROOMS!r} if i.find_spec(r)] == [], 'importable'"
    subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, check=True)


def declared(section: list[str]) -> set[str]:
    """The top-level modules of requirements."""
    names = (re.match(r"[\w.-]+", requirement) for requirement in section)
    return {MODULES.get(name[0], name[0]) for name in names if name is not None}


@cache
def imported() -> set[str]:
    """The top-level modules that the rooms import, at any depth of their code, without Python's own."""
    found = set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"stoker"}


def test_what_is_declared_is_imported_and_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = declared(project["dependencies"]) | declared(
        extras["tiktoken"] + extras["s3"] + extras["mlflow"] + extras["eval"] + extras["gguf"]
    )

    by_others = {"s3fs", "sqlalchemy", "alembic"}  # fsspec imports the first for s3://, mlflow the others for sqlite://
    assert needed - imported() == by_others
    assert imported() - needed == set()


@pytest.mark.long
def test_a_rank_loads_no_compiler_before_it_compiles(tmp_path: Path) -> None:
    """It is 800 modules and more than a second of every start."""
    write_text(tmp_path / "text")
    words = overrides(tmp_path / "run", tmp_path / "text", "steps=2", "batch.micro_size=8", "launch.nproc=1")
    program = f"""
import sys, stoker
for optimizer in ("adamw", "sgd"):
    ending = stoker.run([*{words!r}, f"optim={{optimizer}}", f"run.dir={tmp_path}/{{optimizer}}"])
    assert ending.outcome == "completed", ending
    assert "torch._dynamo" not in sys.modules, optimizer
"""
    ended = subprocess.run([sys.executable, "-P", "-c", program], env=environment(tmp_path), capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()


@pytest.mark.long
def test_deepspeed_is_imported_only_for_its_engine(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    words = overrides(
        tmp_path / "run", tmp_path / "text", "steps=1", "batch.micro_size=8", f"data.cache={tmp_path / 'cache'}",
        "parallel.engine=fsdp", "launch.device=cpu", "launch.nproc=1",
    )  # fmt: skip
    program = f"""
import sys, stoker, stoker.trainer.main
from stoker.launch.cli import main
assert main(["config", *{words!r}]) == 0
assert stoker.run({words!r}).outcome == "completed"
print([name for name in sys.modules if name.partition(".")[0] == "deepspeed"], file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-P", "-c", program], env=environment(tmp_path), capture_output=True)
    assert (ended.returncode, ended.stderr.splitlines()[-1:]) == (0, [b"[]"]), ended.stderr.decode()
