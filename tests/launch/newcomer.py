"""A newcomer at a shell: types the commands that a page prints, and reads what they print."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.schema import Config
from stoker.launch.cli import main
from stoker.trainer.report.metrics import read
from tests.launch.runs import train_forked
from tests.pages import Block, started_by

TRAINING = ("train", "check")  # the commands whose settings are made smaller
SHAPE = [
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.num_key_value_heads=1",
    "model.intermediate_size=64", "model.head_dim=null",
]  # fmt: skip
SMALL = ["seq_len=32", "batch.size=8", "launch.device=cpu", "launch.threads=1", "log.every=1"]


@dataclass(frozen=True)
class Newcomer:
    """In the folder `home`. A run has forked ranks, and no launcher that could start them again."""

    home: Path

    def write(self, blocks: Iterable[Block]) -> None:
        """The files that these blocks hold."""
        for block in blocks:
            if block.file:
                path = self.home / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)

    def types(self, line: str, *smaller: str) -> tuple[int, str]:
        """The exit status of a command line, and its output: first that of programs other than ours.

        `smaller` settings take the place of those of the same key, or stand last.
        """
        started, others = started_by(line, self.home)
        screen, status = io.StringIO(), 0
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            for program, *words in started:
                if program == "torchrun":
                    words = words[words.index("stoker.trainer") + 1 :]
                    status, output = train_forked(self.home, replaced(words, smaller))
                    print(output, end="")
                    continue
                try:
                    status = main(replaced(words, smaller) if words[0] in TRAINING else words)
                except SystemExit as end:
                    status = int(end.code or 0)
        return status, others + screen.getvalue()

    def config(self, run: str) -> Config:
        return read_config(RunDirectory(self.home / run))

    def steps(self, run: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, whose losses are all finite."""
        steps = read(RunDirectory(self.home / run).metrics)
        assert steps and all(math.isfinite(step["loss"]) for step in steps)
        return steps


def replaced(words: Sequence[str], smaller: Sequence[str]) -> list[str]:
    keys = {word.partition("=")[0] for word in smaller}
    return [*(word for word in words if word.partition("=")[0] not in keys), *smaller]
