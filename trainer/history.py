"""The training history in a run directory, and how a run starts over without losing it.

A run that has metrics but no checkpoint never starts over automatically: its checkpoints may only be unreachable. With
`run.fresh=true` metrics and config move to `RUN/earlier/N`, and step 1 follows.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from stoker.checkpoint.names import committed
from stoker.checkpoint.resuming import set_aside
from stoker.conf.durable import is_full
from stoker.conf.identity import read_identity, write_identity
from stoker.conf.rundir import RunDirectory
from stoker.trainer.report.metrics import last_step
from stoker.trainer.report.observer import CheckpointReport, Observer

log = logging.getLogger(__name__)

TRACKER_MEMORY = "tracker.json"


class SavedOnce(Observer):
    """Notes the first checkpoint in `run.json`: from then on a start without a checkpoint is refused."""

    name = "note of the first checkpoint"

    def __init__(self, run: RunDirectory) -> None:
        self._run, self._noted = run, False

    def checkpoint(self, report: CheckpointReport) -> None:
        if report.error is not None or self._noted:
            return
        identity = read_identity(self._run)
        try:
            if identity is not None and not identity.saved:
                write_identity(self._run, dataclasses.replace(identity, saved=True))
            self._noted = True
        except OSError as error:
            if not is_full(error):
                raise
            log.info("noted with the next checkpoint: %s", error)


def has_history(run: RunDirectory) -> bool:
    """Whether steps have been trained here."""
    return last_step(run.metrics) > 0


def has_saved(run: RunDirectory) -> bool:
    """Whether a checkpoint has ever been committed since step 1."""
    identity = read_identity(run)
    return identity is not None and identity.saved


def nothing_to_resume(run: RunDirectory, remote: str | None) -> str:
    """Why a start that finds no checkpoint is refused, and what can be done."""
    looked = str(run.checkpoints) + (f" or {remote}" if remote else "")
    steps = last_step(run.metrics)
    had = f"holds {steps:,} steps in {run.metrics.name}" if steps else "had checkpoints"
    return (
        f"{run.path} {had} and has no valid checkpoint in {looked} to resume from. Restore the checkpoints, or start "
        f"over at step 1 with run.fresh=true: metrics and config then move to {run.earlier(_next(run))}, and the "
        "config is taken from this command line"
    )


def begin_anew(run: RunDirectory) -> Path | None:
    """Move the files of an earlier run aside; returns the folder, None where there was nothing. Raises OSError."""
    if not run.config.exists() and not has_history(run):
        return None
    for checkpoint in committed(run.checkpoints):  # none is valid, and a new one may need the name
        set_aside(checkpoint, "the run starts over")
    target = run.earlier(_next(run))
    target.mkdir(parents=True)
    memory = run.path / TRACKER_MEMORY
    for path in (run.config, run.metrics, run.loss_plot, run.tokenizer, memory, run.path / "faults"):
        if path.exists():
            path.rename(target / path.name)
    identity = read_identity(run)
    if identity is not None and identity.saved:
        write_identity(run, dataclasses.replace(identity, saved=False))
    return target


def _next(run: RunDirectory) -> int:
    number = 1
    while run.earlier(number).exists():
        number += 1
    return number
