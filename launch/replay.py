"""`stoker replay`: recomputes one step of a run in one process."""

from __future__ import annotations

from stoker.conf.printable import printable
from stoker.conf.resume import merge
from stoker.launch.check import ONE_PROCESS
from stoker.launch.inspect import run_at
from stoker.launch.train import say
from stoker.trainer.replay import lines_of, replay
from stoker.trainer.report.metrics import steps
from stoker.trainer.trust import TRAINING, trusted_config


def replay_step(path: str, step: int, trust: bool) -> int:
    """Print the step's results and the first number that is not finite; status 1 if there is one."""
    run = run_at(path)
    config, _ = merge(trusted_config(run, trust, TRAINING, say), [*ONE_PROCESS, "eval.sequences=0", "eval.every=0"])
    config.run.dir = str(run.path)
    found = replay(run, config, step)
    recorded = next((line for line in steps(run.metrics) if line["step"] == step), None)
    for line in lines_of(found, recorded):
        print(printable(line))
    return 1 if found.output or found.gradient or found.weights or found.parameters else 0
