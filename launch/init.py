"""`stoker init`: a folder to start a project from, with settings, a model, data and a batch script."""

from __future__ import annotations

import shutil
from pathlib import Path

from stoker.conf.values import ConfigError

SKELETON = Path(__file__).with_name("skeleton")
EXAMPLE_REPEATS = 400  # of the example text, so that there is something to train on


def init(folder: str) -> int:
    """Copy the skeleton to `folder`. Raises ConfigError where a file of it is there already."""
    target = Path(folder).expanduser()
    files = sorted(
        file.relative_to(SKELETON) for file in SKELETON.rglob("*") if file.is_file() and file.suffix != ".pyc"
    )
    taken = [str(target / file) for file in files if (target / file).exists()]
    if taken:
        raise ConfigError(f"{', '.join(taken)}: exists already, and nothing is replaced: name another folder")
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SKELETON / file, target / file)
    example = target / "texts" / "example.txt"
    example.write_text(example.read_text() * EXAMPLE_REPEATS)
    for file in files:
        print(target / file)
    print(f"\nnext:\n  cd {target}\n  stoker train --config settings.yaml run.dir=runs/first")
    return 0
