"""A small run that has ended, and copies of it, for tests of what the next start does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from stoker.checkpoint import Owner, claim
from stoker.conf.identity import identify
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.trainer.settle import settle_config
from tests.launch.runs import overrides, train_here, write_text

ONE = ["launch.nproc=1", "parallel.zero=0", "batch.micro_size=8", "model.num_hidden_layers=1"]


def words_of(run: Path, text: Path, *more: str) -> list[str]:
    return overrides(run, text, "steps=4", "checkpoint.every=2", *ONE, *more)


def trained_run(home: Path, name: str = "trained", *more: str) -> RunDirectory:
    """A run of 4 steps with checkpoints of steps 2 and 4."""
    write_text(home / "text")
    train_here(home, words_of(home / name, home / "text", *more))
    return RunDirectory(home / name)


def twin(original: RunDirectory, path: Path) -> RunDirectory:
    """As if the run had been trained in `path`."""
    shutil.copytree(original.path, path, symlinks=True)
    run = RunDirectory(path)
    claim(run.checkpoints, Owner(identify(run).run, os.path.realpath(path)), adopt=True)
    return run


def settled(words: list[str], **options: Any) -> Config:
    """The config of a start on one rank. Raises ConfigError for one that is refused."""
    return settle_config(words, lambda _: (1, 0), **options)[0]
