"""A project of the user's own, with packages that are called like our rooms, trains by every way to start a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.extent import some
from tests.launch.runs import command, finish, overrides, steps_of, write_text

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("launch", "trainer", "checkpoint", "models", "data", "parallel", "conf")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

FILES = {
    "models/mine.py": """
from stoker.models.decoder import build as decoder
from models import MARK

def build(config, part):
    assert MARK == "the user's own"
    return decoder(config, part)
""",
    "data/mine.py": """
from pathlib import Path
from stoker.data.documents import Document

def open_source(config):
    return [Document(path.name, path.read_text) for path in sorted(Path("text").iterdir())]
""",
    "trainer/mine.py": """
import torch

def build(parameters, lr, **settings):
    return torch.optim.SGD(parameters, lr=lr)
""",
    "script.py": """
import sys
import stoker
import data.mine, models.mine, conf, launch, checkpoint, parallel

if __name__ == "__main__":
    ending = stoker.run(sys.argv[1:])
    assert ending.outcome == "completed", ending
""",
}


@pytest.fixture(scope="module")
def project(home: Path) -> Path:
    folder = home / "project"
    for room in ROOMS:
        (folder / room).mkdir(parents=True)
        (folder / room / "__init__.py").write_text('MARK = "the user\'s own"\n')
    for name, text in FILES.items():
        (folder / name).write_text(text)
    write_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def words() -> list[str]:
    return ["model.target=models.mine:build", "data.target=data.mine:open_source", "optim.target=trainer.mine:build"]


@pytest.mark.long
@pytest.mark.parametrize("way", some(["stoker train", "script", "torchrun"], 2))
def test_targets_in_folders_called_like_our_rooms_train(home: Path, project: Path, words: list[str], way: str) -> None:
    run = project / "runs" / way.replace(" ", "-")
    start = {
        "stoker train": command("train"),
        "torchrun": [*TORCHRUN, "-m", "stoker.trainer"],
        "script": [*TORCHRUN, "script.py"],
    }[way]
    settings = overrides(run, project / "text", "steps=2", "data=stdlib", "data.tokenizer=byte", *words)
    status, output = finish(home, [*start, *settings], cwd=project)
    assert status == 0, output
    assert [step[0] for step in steps_of(run)] == [1, 2]
