"""`alerts.command`: a user's command that is run when something happened to a run, by a process beside rank 0.

A command that hangs or fails therefore delays no step, and the process outlives a rank 0 that was killed: it reads how
the attempt ended from the run directory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from stoker.conf.rundir import RunDirectory
from stoker.trainer.report.tracker_sinks import Values
from stoker.trainer.runtime.outcome import Ending, Outcome, read_ending

COMMAND_SECONDS = 30.0  # after which a command is killed
OUTCOME_SECONDS = 10.0  # for a launcher to write how an attempt ended whose rank 0 did not
EVENTS = ("hang", "rollback", "failure", "end")
_POLL_SECONDS = 0.1


class Alerts:
    """The sink: steps only tell it how far the run is."""

    def __init__(self, job: Values, run_id: str, first_step: int, say: Callable[[str], None]) -> None:
        self._command, self._wanted = job["command"], job["on"]
        self._run, self._attempt, self._name = RunDirectory(Path(job["run_dir"])), int(job["attempt"]), job["name"]
        self._step = first_step - 1

    def log(self, step: int, values: dict[str, float]) -> None:
        self._step = step

    def flush(self) -> None:
        pass

    def close(self, outcome: str | None) -> None:
        """`outcome`: of the attempt; `rolled back` within one; None where rank 0 has ended without any."""
        if outcome == "rolled back":
            self._alert("rollback", outcome, "the run went back to a checkpoint, to continue without a bad step")
            return
        ending = self._ending(OUTCOME_SECONDS if outcome in (None, Outcome.FAILED) else 1.0)
        outcome = str(ending.outcome) if ending is not None else outcome or str(Outcome.FAILED)
        message = ending.message if ending is not None else "rank 0 left no exit record"
        if ending is not None and ending.step is not None:
            self._step = ending.step
        failed = outcome in (Outcome.FAILED, Outcome.NONFINITE)
        self._alert("hang" if outcome == Outcome.HUNG else "failure" if failed else "end", outcome, message)

    def _ending(self, seconds: float) -> Ending | None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                found = read_ending(self._run, self._attempt)
            except (OSError, ValueError):
                found = None
            if found is not None or time.monotonic() > deadline:
                return found
            time.sleep(_POLL_SECONDS)

    def _alert(self, event: str, outcome: str, message: str) -> None:
        if event not in self._wanted:
            return
        values = {
            "event": event, "run": str(self._run.path), "name": self._name, "attempt": self._attempt,
            "step": self._step, "outcome": outcome, "message": message,
        }  # fmt: skip
        environment = {**os.environ, **{f"STOKER_{key.upper()}": str(value) for key, value in values.items()}}
        process = subprocess.Popen(
            ["/bin/sh", "-c", self._command], stdin=subprocess.PIPE, stdout=sys.stderr, env=environment,
            start_new_session=True, text=True,
        )  # fmt: skip
        try:
            process.communicate(json.dumps(values) + "\n", timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"alerts.command was killed after {COMMAND_SECONDS:.0f} s", file=sys.stderr, flush=True)
