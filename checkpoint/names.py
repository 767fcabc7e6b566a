"""Names inside `RUN/checkpoints/`. Only names and errors: nothing is created, and only directories are listed.

step-00000010/                      committed
step-00000010.attempt-3.partial/    being written by attempt 3
step-00000010.attempt-3.failed.json why attempt 3 abandoned that save
step-00000010.removed/              being deleted
damaged/step-00000010/              set aside because something in it was bad
step-00000010.fetched.partial/      being downloaded from the remote
FENCE                               the newest attempt: older ones may not commit
OWNER                               the run that keeps its checkpoints here: no other may
UPLOADING                           the step that all ranks are uploading
"""

from __future__ import annotations

import re
from pathlib import Path

from stoker.conf.reasons import root_cause

MANIFEST = "MANIFEST.json"
STATE = "state.json"
FENCE = "FENCE"
OWNER = "OWNER"
UPLOADING = "UPLOADING"
DAMAGED = "damaged"
PARTIAL = ".partial"
REMOVED = ".removed"  # of whole directories that are being deleted
FAILED = ".failed.json"

_STEP = re.compile(r"step-([0-9]{8,})")
_INDEX = re.compile(r"rank-([0-9]{5,})\.index\.json")


class DamagedCheckpoint(Exception):
    """Stored data differ from what was written: a file is missing, cut, changed or no checkpoint of Stoker's at all."""


class CheckpointMismatch(ValueError):
    """The checkpoint is sound, but it is not one of this model."""


class SaveFailed(Exception):
    """A save cannot be committed. The message is one line for the user."""


def step_directory(directory: Path, step: int) -> Path:
    """The directory of the committed checkpoint of `step`."""
    return directory / f"step-{step:08d}"


def partial_directory(directory: Path, step: int, attempt: int, trial: int) -> Path:
    """Where a save is written. `trial` counts, from 1, how often this attempt has begun to save `step`."""
    again = f".{trial}" if trial > 1 else ""
    return directory / f"step-{step:08d}.attempt-{attempt}{again}{PARTIAL}"


def fetched_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` is put together from the remote."""
    return directory / f"step-{step:08d}.fetched{PARTIAL}"


def failure_note(partial: Path) -> Path:
    """The file with rank 0's reason for abandoning the save in `partial`."""
    return partial.with_name(partial.name.removesuffix(PARTIAL) + FAILED)


def data_name(rank: int) -> str:
    """The tensors that `rank` wrote."""
    return f"rank-{rank:05d}.safetensors"


def index_name(rank: int) -> str:
    """The positions of tensors in the data of `rank`, and its checksums."""
    return f"rank-{rank:05d}.index.json"


def rank_failure_name(rank: int) -> str:
    """Written in place of the index by a rank that could not write its data."""
    return f"rank-{rank:05d}{FAILED}"


def rank_of_index(name: str) -> int | None:
    """The inverse of `index_name`; None for any other name."""
    match = _INDEX.fullmatch(name)
    return int(match[1]) if match and index_name(int(match[1])) == name else None


def committed(directory: Path) -> list[Path]:
    """The directories of `directory` that are named as committed checkpoints, newest first, with any contents."""
    try:
        entries = list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = [step for entry in entries if (step := step_of(entry)) is not None and entry.is_dir()]
    return [step_directory(directory, step) for step in sorted(steps, reverse=True)]


def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a committed checkpoint; None for any other name."""
    match = _STEP.fullmatch(checkpoint.name)
    return int(match[1]) if match and f"step-{int(match[1]):08d}" == checkpoint.name else None


def one_line(error: BaseException) -> str:
    """The text of `error` on one line, with that of its root cause where it has another."""
    text, cause = (" ".join(str(one).split()) or type(one).__name__ for one in (error, root_cause(error)))
    return text if cause in text else f"{text}: {cause}"
