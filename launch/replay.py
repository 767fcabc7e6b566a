"""`stoker replay`: recomputes one step of a run in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stoker.conf.printable import printable
from stoker.conf.resume import merge
from stoker.launch.check import NO_TASKS, ONE_PROCESS
from stoker.launch.inspect import run_at
from stoker.launch.train import say
from stoker.trainer.replay import lines_of, replay
from stoker.trainer.report.metrics import steps
from stoker.trainer.trust import TRAINING, trusted_config

_LINES = 5  # of progress, where there is no terminal


@contextmanager
def _shown() -> Iterator[Callable[[int, int], None]]:
    """Shows on stderr how the steps before the one that is asked for are trained: a bar; lines where that is a file."""
    console = Console(stderr=True)
    columns = (TextColumn("training step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, begun = bar.add_task(""), -1

        def progress(done: int, last: int) -> None:
            nonlocal begun
            first, begun = begun < 0, done if begun < 0 else begun
            before = last - begun - 1  # steps to train first
            if first and before:
                start = f"the checkpoint of step {done}" if done else "the initial weights"
                say(f"training first, from {start}: steps {done + 1} to {last - 1}")
            trained = done - begun
            if not first and not console.is_terminal and trained * _LINES // before > (trained - 1) * _LINES // before:
                say(f"step {done} of {last - 1} is trained")
            bar.update(task, completed=done, total=last)

        yield progress


def replay_step(path: str, step: int, trust: bool) -> int:
    """Print the step's results and the first number that is not finite; status 1 if there is one."""
    run = run_at(path)
    quiet = [*ONE_PROCESS, "eval.sequences=0", "eval.every=0", *NO_TASKS]
    config, _ = merge(trusted_config(run, trust, TRAINING, say), quiet)
    config.run.dir = str(run.path)
    with _shown() as progress:
        found = replay(run, config, step, progress)
    recorded = next((line for line in steps(run.metrics) if line["step"] == step), None)
    for line in lines_of(found, recorded):
        print(printable(line))
    return 1 if found.output or found.gradient or found.weights or found.parameters else 0
