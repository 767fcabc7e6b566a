"""What a user installs: one top-level package, which leaves every other name to its user."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("launch", "trainer", "checkpoint", "models", "data", "parallel", "conf")


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
