"""Slurm's commands and their output. Every error is a ValueError of one line."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

_SECONDS = 60.0  # for a controller to answer


def call(*words: str) -> str:
    """What a command prints. Raises ValueError when it is not installed, does not answer or refuses."""
    if shutil.which(words[0]) is None:
        raise ValueError(f"{words[0]} is not found: this is no machine of a Slurm cluster, or PATH lacks its folder")
    try:
        ended = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{words[0]} has not answered within {_SECONDS:.0f} s: is slurmctld up?") from None
    if ended.returncode != 0:
        lines = (ended.stderr or ended.stdout).strip().splitlines()
        answer = re.sub(r"^\w+: (error: )?", "", lines[-1]) if lines else f"status {ended.returncode}"
        raise ValueError(
            f"{words[0]} refuses: {answer}" + (f" (partitions: {partitions()})" if "artition" in answer else "")
        )
    return ended.stdout


def partitions() -> str:
    """The names of the cluster's partitions, or `unknown`."""
    if shutil.which("sinfo") is None:
        return "unknown"
    ended = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, timeout=_SECONDS)
    return ", ".join(ended.stdout.split()) or "unknown"


def submit(script: Path, *options: str) -> str:
    """The number of the new job."""
    return call("sbatch", "--parsable", *options, str(script)).strip().split(";")[0]


def facts_of_job(job: str) -> dict[str, str]:
    """The controller's facts of a job: JobState, EndTime, ... Raises ValueError where it does not answer."""
    return _facts(call("scontrol", "show", "job", "-o", job).splitlines()[0])


def facts_of_partition(name: str) -> dict[str, str]:
    return _facts(call("scontrol", "show", "partition", "-o", name).splitlines()[0])


def requeue(job: str) -> None:
    call("scontrol", "requeue", job)


def cancel(job: str) -> None:
    call("scancel", job)


def time_of(text: str) -> float | None:
    """`2026-12-24T18:00:00`, in the cluster's time, as seconds since the epoch; None for Unknown and the like."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def seconds_of(text: str) -> float | None:
    """Seconds of `120`, `02:00` or `1-00:00:00` as scontrol prints durations; None for UNLIMITED and the like."""
    days, _, rest = text.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        seconds = 0
        for part in parts:
            seconds = seconds * 60 + part
        return float(int(days or 0) * 86400 + seconds)
    except ValueError:
        return None


def _facts(line: str) -> dict[str, str]:
    return {key: value for key, equals, value in (word.partition("=") for word in line.split()) if equals}
