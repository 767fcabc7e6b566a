"""The plan of an attempt, written while it trains by a process that runs only where processors are idle.

    python -m stoker.trainer.plan.record RUN ATTEMPT RANKS PARENT

Our launcher starts it (`log.plan`), or under another launcher rank 0. It waits, with few imports, for the attempt's
first step, copies the plan of an earlier attempt of the same launch or makes one of the stored config, writes
`attempts/K/plan.json` and ends. A plan that cannot be made leaves a line in `plan.log` there. It never outlives the
process that started it; our launcher ends it with the ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from stoker.conf.durable import write_whole
from stoker.conf.parent_death import die_with
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.schema import Config
from stoker.trainer.report.metrics import last_step
from stoker.trainer.report.predicted import Predicted, keep, read_predicted
from stoker.trainer.runtime.outcome import read_beginning

LOOK_SECONDS = 0.5


class PlanRecord:
    """The process of one attempt, as the one that starts it holds it. Raises OSError where none can be started."""

    def __init__(self, run: RunDirectory, attempt: int, ranks: int) -> None:
        words = [str(run.path), str(attempt), str(ranks), str(os.getpid())]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "stoker.trainer.plan.record", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def wants_plan(config: Config) -> bool:
    """`log.plan`; by default, whether the ranks compute on GPUs, beside which processors idle."""
    if config.log.plan is not None or config.launch.device == "cpu":
        return bool(config.log.plan)
    import torch  # who asks has it, the process here does without while it waits

    return torch.cuda.device_count() > 0


def main() -> None:
    path, attempt, ranks, parent = sys.argv[1:]
    die_with(int(parent))
    _give_way()
    run, number = RunDirectory(Path(path)), int(attempt)
    try:
        _wait_for_a_step(run, number)
        earlier = _earlier(run, number)
        keep(run, number, earlier if earlier is not None else _made(run, int(ranks)))
    except Exception as error:  # of any kind: the run goes on without
        with suppress(OSError):
            write_whole(run.plan(number).with_suffix(".log"), f"no plan: {error}\n".encode())


def _give_way() -> None:
    """Run on processors that no other process wants."""
    with suppress(OSError):
        os.nice(19)
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no context, which would take memory of the ranks' GPUs


def _wait_for_a_step(run: RunDirectory, attempt: int) -> None:
    while (beginning := read_beginning(run, attempt)) is None or last_step(run.metrics) <= beginning.from_step:
        time.sleep(LOOK_SECONDS)


def _earlier(run: RunDirectory, attempt: int) -> Predicted | None:
    """The plan of the attempt before, if the same launch made it."""
    ours = run.launch(attempt).read_bytes()
    for number in reversed(run.attempt_numbers()):
        if number < attempt:
            with suppress(OSError, ValueError):
                return read_predicted(run, number) if run.launch(number).read_bytes() == ours else None
            return None
    return None


def _made(run: RunDirectory, ranks: int) -> Predicted:
    from stoker.trainer.facts import with_vocabulary
    from stoker.trainer.plan.make import Asked, Machine, make_plan, predicted_of

    config = read_config(run)  # stored before the first step
    machine = Machine("cpu", None)
    if config.launch.device != "cpu" and (name := _gpu()) is not None:
        from stoker.conf.devices import device_called

        machine = Machine("cuda", device_called(name))
    return predicted_of(make_plan(with_vocabulary(config, run.tokenizer), ranks, machine, Asked()))


def _gpu() -> str | None:
    """The name of the first GPU of this machine, without a context on it."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = found.stdout.splitlines()
    return lines[0].strip() if found.returncode == 0 and lines else None


if __name__ == "__main__":
    main()
