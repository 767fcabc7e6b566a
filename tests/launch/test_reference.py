"""The reference has every key and command, and the pages of the site link only to each other."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from stoker.conf.schema import kinds
from stoker.launch.cli import main, parser
from stoker.launch.reference import commands_markdown, keys, keys_markdown
from stoker.launch.reference import main as write_reference
from tests.launch.runs import train_here

ROOT = Path(__file__).resolve().parents[2]


def test_every_key_has_a_line_with_type_default_kind_and_meaning() -> None:
    found = {key.name: key for key in keys()}
    assert found.keys() == kinds().keys()
    assert all(key.meaning and key.type and key.kind in ("free", "maths", "fixed") for key in found.values())
    lr = found["optim.lr"]
    assert (lr.type, lr.default, lr.kind, lr.meaning) == ("a number", "0.001", "maths", "peak learning rate")
    assert lr.limit == "above 0" and found["model.rope_parameters.rope_theta"].default == "10000.0"
    text = keys_markdown()
    assert "| `batch.size` | a whole number | `32` | maths | sequences per optimizer step over all ranks" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(found) and all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)


def test_every_command_is_there_with_its_options() -> None:
    text = commands_markdown(parser())
    for name in ("stoker train", "stoker sweep", "stoker report", "stoker compare", "stoker checkpoint verify"):
        assert f"## {name}\n" in text
    assert "--random" in text and text.count("```text") == text.count("\n## ")


def test_the_pages_of_the_site_link_only_to_pages_of_the_site(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site.py")
    assert spec is not None and spec.loader is not None
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    assert site.main(str(tmp_path)) == 0
    there = {path.name for path in tmp_path.glob("*.md")}
    for path in tmp_path.glob("*.md"):
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        targets = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
        assert targets - {""} <= there, path.name
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = {page for entry in nav for pages in entry.values() for page in _pages(pages)}
    assert named == there, "every page is in the navigation once"
    source, names = ROOT / "docs" / "x.md", site.pages()
    assert site.rewritten(source, "```python a.py\nx = 1\n```\n", names).startswith('```python title="a.py"\n')
    text = "[a](../conf/schema.py) [b](data.md#sources) [`c`](../conf) ```[d](../conf/schema.py)\n"
    assert site.rewritten(source, text, names).startswith("`conf/schema.py` [b](data.md#sources) `c` ")


def _pages(entry: str | list[dict[str, str]]) -> list[str]:
    return [entry] if isinstance(entry, str) else [page for one in entry for page in one.values()]


def test_the_reference_is_written_into_a_folder(tmp_path: Path) -> None:
    assert write_reference(str(tmp_path / "new")) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"keys.md", "commands.md"}


def test_a_new_project_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    project, skeleton = tmp_path / "project", tmp_path / "installed"
    shutil.copytree(ROOT / "launch" / "skeleton", skeleton)
    (skeleton / "__pycache__").mkdir()
    (skeleton / "__pycache__" / "my_model.cpython-311.pyc").touch()  # pip compiles what it installs
    monkeypatch.setattr("stoker.launch.init.SKELETON", skeleton)
    assert main(["init", str(project)]) == 0
    made = {path.name for path in project.rglob("*") if path.is_file()}
    assert made == {"settings.yaml", "my_data.py", "my_model.py", "train.sbatch", "example.txt"}
    assert "stoker train --config settings.yaml" in capsys.readouterr().out
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])
    from stoker.conf.files import expand

    words = expand(["--config", "settings.yaml", f"run.dir={project / 'run'}", "steps=2", "launch.nproc=2"])
    train_here(project, [*words, "batch.size=4", "seq_len=64", "schedule.warmup_steps=1", "eval.sequences=0"])
    assert main(["init", str(project)]) == 2
    assert "exists already, and nothing is replaced" in capsys.readouterr().err
