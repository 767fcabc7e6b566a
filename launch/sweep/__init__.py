"""`stoker sweep`: many runs of one config, a run directory each, here in turn or as a Slurm array.

`points`   the settings that differ: a grid, some of it at random, or what a program proposes
`trials`   numbers, settings and outcomes, in the sweep's folder

The folder is all the memory that a sweep has. Killed and given again, the same command starts no trial that is done,
resumes the one that was interrupted (or starts it over where it had no checkpoint yet), and begins those that are left.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Sequence
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from stoker.checkpoint import newest_step
from stoker.conf.compose import compose
from stoker.conf.files import expand
from stoker.conf.printable import printable
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.launch.inspect import console_for_tables
from stoker.launch.sweep.points import Point, asked, chosen, divided, grid
from stoker.launch.sweep.trials import Trial, Trials
from stoker.launch.train import gpus, ranks_for, say, train
from stoker.trainer.history import begin_anew, has_history, has_saved
from stoker.trainer.report.metrics import last_step
from stoker.trainer.runtime.outcome import GOES_ON, Outcome
from stoker.trainer.trust import Code, code_of
from stoker.trainer.validate import validate

REPORT = "report.html"


def sweep(words: Sequence[str], random: int | None = None, seed: int = 0, ask: str | None = None) -> int:
    """Run every point of the sweep; the exit status: 0 if all trials are completed.

    `words` are as typed: `optim.lr=1e-3,3e-4` is swept. `random`: so many combinations instead of all, by `seed`;
    `ask`: a program that proposes each point. Raises ConfigError before the first run for a point that is refused.
    """
    fixed, swept = divided(words)
    if not swept and ask is None:
        raise ConfigError("nothing to sweep: give a key several values, such as optim.lr=1e-3,3e-4, or --ask CMD")
    if swept and ask is not None:
        raise ConfigError(f"{swept[0][0].partition('=')[0]} has several values, but with --ask a program proposes them")
    if random is not None and random < 1:
        raise ConfigError(f"--random {random}: it counts runs, so it is at least 1")
    fixed, folder = _place(fixed, words)
    trials = Trials(folder)
    with trials.held():
        if ask is not None:
            status = _run_asked(trials, fixed, ask)
        else:
            points = grid(swept) if random is None else chosen(swept, random, seed)
            configs = [_checked(fixed, point) for point in points]
            found = trials.of(points)
            if configs[0].launch.name == "slurm":
                return _submit(trials, found, fixed)
            status = _run_all(found, fixed)
        finish(trials.all())
    return status


def _place(fixed: list[str], words: Sequence[str]) -> tuple[list[str], Path]:
    """The words for every run, and the sweep's folder: `run.dir`, or `runs/` and a name made of the command."""
    given = dict(word.partition("=")[::2] for word in fixed)
    if given.get("run.fresh", "false") != "false":
        raise ConfigError("run.fresh=true would do finished trials again: remove the folder of the sweep instead")
    name = given.get("run.name") or f"sweep-{hashlib.sha256(repr(sorted(words)).encode()).hexdigest()[:8]}"
    folder = Path(given.get("run.dir") or Path("runs") / name).expanduser().absolute()
    return [word for word in fixed if not word.startswith(("run.dir=", "run.name="))], folder


def _checked(fixed: Sequence[str], point: Point) -> Config:
    """The config of a point. Raises ConfigError naming the point, for what a start would refuse."""
    try:
        config = compose(expand([*fixed, *point]))
        if config.launch.name == "local" and config.model.init_from is None:  # else checked where it starts
            validate(config, ranks_for(config), gpus(config))
    except ConfigError as error:
        raise ConfigError(f"{' '.join(point)}: {error}") from error
    return config


def _run_all(trials: list[Trial], fixed: Sequence[str]) -> int:
    """Start what is not done, in turn."""
    for place, trial in enumerate(trials, 1):
        ended = _run(trial, fixed, f"{place} of {len(trials)}")
        if ended is not None:
            return ended
    return 0 if all(trial.outcome == Outcome.COMPLETED for trial in trials) else 1


def _run_asked(trials: Trials, fixed: Sequence[str], command: str) -> int:
    """Finish the proposals on the list, then ask for more. A proposal is on the disk before its run begins."""
    code = code_of(compose(expand(fixed)))
    tried: list[Trial] = []
    while True:
        known = trials.all()
        if len(tried) < len(known):
            trial = known[len(tried)]
            _checked_proposal(fixed, trial.point, code)  # the list may be another user's
        else:
            point = asked(command, [done.as_result() for done in tried])
            if point is None:
                break
            if any(point == done.point for done in tried):
                raise ConfigError(f"--ask {command!r} proposed {' '.join(point)} a second time")
            _checked_proposal(fixed, point, code)
            trial = trials.of([point])[0]
        tried.append(trial)
        ended = _run(trial, fixed, str(len(tried)))
        if ended is not None:
            return ended
    return 0 if tried and all(trial.outcome == Outcome.COMPLETED for trial in tried) else 1


def _checked_proposal(fixed: Sequence[str], point: Point, code: Code) -> None:
    """Raises ConfigError for a point that is refused, or would run other code than the command line names."""
    if code_of(_checked(fixed, point)) != code:
        raise ConfigError(
            f"{' '.join(point)}: a proposal cannot change which code runs; give such keys on the command line"
        )


def _run(trial: Trial, fixed: Sequence[str], place: str) -> int | None:
    """Train one trial; a status where the sweep ends with it."""
    named = " ".join(trial.point)
    if trial.done:
        say(f"trial {place}: {named}: {trial.outcome} before")
        return None
    say(f"trial {place}: {named}")
    _begin_anew_if_unsaved(trial)
    own = [f"run.dir={trial.run.path}", f"run.name={trial.run.path.parent.name}-{trial.number}"]
    try:
        status = train(expand([*fixed, *trial.point, *own], say))
    except ConfigError as error:
        say(f"trial {place}: {error}")
        return None
    outcome = trial.outcome
    if status == GOES_ON or status >= 128 or outcome in (Outcome.STOPPED, Outcome.PREEMPTED):
        say("the sweep ends here; the same command goes on with it")
        return status or 128 + signal.SIGINT
    return None


def _begin_anew_if_unsaved(trial: Trial) -> None:
    """A trial that was killed before its first checkpoint has nothing to resume from: its steps move aside."""
    run = trial.run
    if has_history(run) and not has_saved(run) and newest_step(run.checkpoints) == 0:
        steps, aside = last_step(run.metrics), begin_anew(run)
        say(f"it ended at step {steps}, before its first checkpoint, and starts over; those steps are in {aside}")


def _submit(trials: Trials, found: list[Trial], fixed: Sequence[str]) -> int:
    """A task of one Slurm array for each trial that is not done."""
    from stoker.launch.slurm import commands
    from stoker.launch.slurm.submit import submit_jobs

    left = [trial for trial in found if not trial.done]
    if trials.job is not None and left:
        try:
            state = commands.facts_of_job(trials.job).get("JobState", "")
        except ValueError:  # it has ended, and the controller has forgotten it
            state = ""
        if state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "SUSPENDED"):
            show(found)
            say(f"job {trials.job} of this sweep is {state.lower()}: `scancel {trials.job}` ends it")
            return 0
    if not left:
        finish(found)
        return 0 if all(trial.outcome == Outcome.COMPLETED for trial in found) else 1
    for trial in left:
        _begin_anew_if_unsaved(trial)
        trials.settings_file(trial)
    tasks = ",".join(str(trial.number) for trial in left)
    pattern = trials.folder / "settings" / "{task}.yaml"
    own = [f"launch.array={tasks}", f"run.dir={trials.folder}/{{task}}", f"--config={pattern}"]
    trials.job = submit_jobs([*fixed, *own])[0]
    trials.write()
    say(f"the same command shows how the sweep is doing, and writes {trials.folder / REPORT} at its end")
    return 0


def finish(trials: Sequence[Trial]) -> None:
    """The table of all trials, and a report of the best of them."""
    from stoker.launch.report import MOST_RUNS, report

    ranked = show(trials)
    begun = [str(trial.run.path) for trial in ranked if trial.run.attempt_numbers() and trial.run.config.exists()]
    if begun:
        report(begun[:MOST_RUNS], str(ranked[0].run.path.parent / REPORT), "html")


def show(trials: Sequence[Trial]) -> list[Trial]:
    """Print the trials, the best first; in that order."""
    rows = [(trial, *trial.result()) for trial in trials]

    def rank(row: tuple[Trial, int, float | None, float | None]) -> tuple[float, int]:
        trial, _, loss, val_loss = row
        value = val_loss if val_loss is not None else loss
        return (float("inf") if value is None else value), trial.number

    rows.sort(key=rank)
    right = [Column(name, justify="right", no_wrap=True) for name in ("trial", "step", "loss", "val loss")]
    table = Table(right[0], Column("settings", overflow="fold"), "outcome", *right[1:], box=None, pad_edge=False)
    for trial, step, *losses in rows:
        figures = ("" if value is None else f"{value:.4f}" for value in losses)
        settings = Text(printable(" ".join(trial.point)))
        table.add_row(str(trial.number), settings, trial.outcome, f"{step:,}", *figures)
    console_for_tables().print(table)
    return [row[0] for row in rows]
