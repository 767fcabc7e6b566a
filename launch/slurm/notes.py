"""What jobs of a run decided, one note each, in its directory: for `stoker status`, `stop` and the jobs that follow."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stoker.conf.durable import open_own
from stoker.conf.records import parse_json, record_of
from stoker.conf.rundir import RunDirectory

SUBMITTED = "submit"  # a note's move, beside those of `stoker.launch.slurm.verdict.Move`


def notes_file(run: RunDirectory) -> Path:
    """One JSON object for each job that was submitted, and for each decision of one."""
    return run.slurm / "jobs.jsonl"


@dataclass(frozen=True)
class _Note:
    time: float  # seconds since the epoch
    job: str
    move: str
    why: str


def write_note(run: RunDirectory, job: str, move: str, why: str) -> None:
    note = {"time": time.time(), "job": job, "move": move, "why": why}
    with open(open_own(notes_file(run), os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")


def read_notes(run: RunDirectory) -> list[dict]:
    """The notes, oldest first. A line that is none, such as one torn by a kill, is left out."""
    if not notes_file(run).exists():
        return []
    found = []
    for line in notes_file(run).read_bytes().splitlines():
        with suppress(ValueError):
            found.append(vars(record_of(parse_json(line), _Note)))
    return found
