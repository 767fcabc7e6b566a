"""Requests to a run to stop, or to requeue. Both are files in the run directory, so they reach it on any machine."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from stoker.conf.durable import touch_own
from stoker.conf.identity import identify
from stoker.conf.printable import printable
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.values import ConfigError
from stoker.launch.control import living
from stoker.launch.inspect import run_at
from stoker.launch.slurm import commands
from stoker.launch.slurm.notes import read_notes
from stoker.trainer.runtime.outcome import Outcome, read_beginning, read_ending

_POLL_SECONDS = 0.1
_NOTES = 20  # newest notes of jobs that are checked
_GONE = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def stop(path: str, wait_seconds: float) -> int:
    """Request the run to save and end, and wait for it; status 1 if it does not in time, or is not running."""
    run = run_at(path)
    at = living(run)
    if at is None:
        return _stop_waiting_job(run)
    number = run.attempt_numbers()[-1]
    touch_own(run.stop)
    print(f"requested: the run is at step {at.step}", flush=True)
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        ending = read_ending(run, run.attempt_numbers()[-1])
        if ending is not None and (ending.outcome is not Outcome.FAILED or not ending.retry):
            print(printable(ending.message))
            return 0 if ending.outcome in (Outcome.STOPPED, Outcome.COMPLETED, Outcome.PREEMPTED) else 1
        if living(run) is None and run.attempt_numbers()[-1] == number and _job_of(run) is None:
            print("the run left no exit record: its newest checkpoint is its last state", file=sys.stderr)
            return 1
        time.sleep(_POLL_SECONDS)
    print(f"still running after {wait_seconds:.0f} s: it ends when its step does", file=sys.stderr)
    return 1


def requeue(path: str, trust: bool) -> int:
    """Make a Slurm run save and go back to the queue; submit it again if it has ended.

    Raises ConfigError for a batch script that this user has not written, unless `trust`.
    """
    run = run_at(path)
    if living(run) is not None:
        beginning = read_beginning(run, run.attempt_numbers()[-1])
        job = beginning.job if beginning is not None else None
        if job is None:
            raise ConfigError(f"{run.path} does not run as a Slurm job: stop it, then start it where it should run")
        touch_own(run.requeue)
        print(f"requested: the run saves, and job {job} goes back to the queue")
        return 0
    job = _job_of(run)
    if job is not None and commands.facts_of_job(job).get("JobState") == "PENDING":
        raise ConfigError(f"job {job} waits in the queue already")
    if not run.script.exists():
        raise ConfigError(
            f"{run.path} was not submitted by `stoker submit`: resume it by `stoker train run.dir={run.path}`"
        )
    _refuse_foreign_script(run, trust)
    from stoker.launch.slurm.submit import submit_script  # with what settles a config, and torch

    [number] = submit_script(run, 1)
    print(f"submitted {run.script} as job {number}")
    return 0


def _refuse_foreign_script(run: RunDirectory, trust: bool) -> None:
    """The script is a program; what `trust` allows is recorded, because the job checks it again."""
    from stoker.trainer.trust import code_of, is_remembered_script, remember, remember_script, shown

    text = run.script.read_text(encoding="utf-8")
    if is_remembered_script(run, text):
        return
    code = code_of(read_config(run)) if run.config.exists() else {}
    if not trust:
        listed = "".join(f"\n  {key}={shown(value)}" for key, value in code.items())
        raise ConfigError(
            f"{run.script} is a program that this user has not submitted: read it, and run it with --trust{listed}"
        )
    owner = identify(run).run
    remember_script(owner, text)
    if code:
        remember(owner, read_config(run))


def _stop_waiting_job(run: RunDirectory) -> int:
    jobs = _jobs_of(run)
    if not jobs:
        print(f"no rank is training {run.path}: there is nothing to stop", file=sys.stderr)
        return 1
    for job in jobs:  # the last of a chain first
        commands.cancel(job)
        print(f"cancelled job {job}, which was not training")
    return 0


def _job_of(run: RunDirectory) -> str | None:
    return next(reversed(_jobs_of(run)), None)


def _jobs_of(run: RunDirectory) -> list[str]:
    """The run's Slurm jobs that the controller lists as not ended, the newest first."""
    known: dict[str, float] = {note["job"]: note["time"] for note in reversed(read_notes(run)[-_NOTES:])}
    numbers = run.attempt_numbers()
    beginning = read_beginning(run, numbers[-1]) if numbers else None
    if beginning is not None and beginning.job is not None:
        known.setdefault(beginning.job, beginning.time)
    return [job for job in sorted(known, key=lambda job: known[job], reverse=True) if not _is_gone(job)]


def _is_gone(job: str) -> bool:
    with suppress(ValueError):
        return commands.facts_of_job(job).get("JobState") in _GONE
    return True  # no Slurm here, or a job that it has forgotten
