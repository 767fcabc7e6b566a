"""Trackers (Weights & Biases, TensorBoard) run in a separate process that follows metrics.jsonl.

The loop therefore never waits for a tracker's library: its imports, threads, signal handlers, a network that hangs, a
crash. Steps that a tracker has not received yet are in the file, so it catches up after a slow start, after a
failure, even when it is switched on in mid-run. `RUN/tracker.json` holds the tracker's run id and the last step given
to it; a restart from an older checkpoint repeats steps, and those up to `last_step` are not given again.

    rank 0 -- one line of JSON: the job --------> stdin   tracker_process.py
           -- one line of JSON: the outcome ----> stdin   (or end of file: rank 0 has ended)
           <- lines of JSON: say or failed ------ stdout
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from stoker.conf.durable import open_own
from stoker.conf.identity import read_identity
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config, TrackerConfig, to_dict
from stoker.trainer.report.observer import Observer, StepRecord

LOG = "tracker.log"
_WANDB_MODES = {"online": "online", "offline": "offline", "disabled": "disabled", "run": "online", "dryrun": "offline"}
_TRUE = ("true", "1", "yes", "y", "on", "t")  # as wandb reads WANDB_DISABLED
FINISH_SECONDS = 5.0  # a rank ends within ten seconds of SIGTERM


class TrackerError(Exception):
    """The tracker's process has failed; the text is the reason."""


class Tracker(Observer):
    """Starts the process, prints its lines, and raises TrackerError when it has failed."""

    def __init__(self, config: TrackerConfig, run: RunDirectory, say: Callable[[str], None]) -> None:
        self.name = f"tracker {config.name}"
        self._config = config
        self._run = run
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._job: dict[str, Any] = {}

    def start(self, config: Config, resumed_from_step: int | None, total_steps: int, facts: Mapping[str, str]) -> None:
        identity = read_identity(self._run)
        job: dict[str, Any] = {
            "run": identity.run if identity is not None else None,
            "tracker": self._config.name,
            "run_dir": str(self._run.path.absolute()),
            "metrics": str(self._run.metrics.absolute()),
            "trainer_pid": os.getpid(),
            "name": config.run.name or self._run.path.name,
            "config": to_dict(config) | {"facts": dict(facts)},
        }
        if self._config.name == "wandb":
            mode, why = wandb_mode(self._config, os.environ)
            if mode == "disabled":
                self._say(f"wandb is disabled ({why})")
                return
            job |= {"project": self._config.project, "entity": self._config.entity, "mode": mode}
            self._say(f"wandb is {mode} ({why})" + (f", files in {self._run.path}/wandb" if mode == "offline" else ""))
        self._job = job
        self._begin()

    def _begin(self) -> None:
        program = Path(__file__).with_name("tracker_process.py")
        with open(open_own(self._run.path / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C ends the ranks; the tracker still has to record it
            )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._write(self._job)

    def rolled_back(self, step: int) -> None:
        """The file was truncated: start a new process, as after a restart."""
        if self._process is None:
            return
        self.finish("rolled back", step)
        self._begin()

    def step(self, record: StepRecord) -> None:
        if self._process is not None:
            self._listen()

    def finish(self, outcome: str, step: int) -> None:
        if self._process is None:
            return
        self._listen()
        self._write({"outcome": outcome})
        try:
            self._process.wait(FINISH_SECONDS)
        except subprocess.TimeoutExpired:
            self._say(f"{self.name} is still busy and continues in the background for up to a minute")
            return
        self._listen()
        self._check_exit()

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and `_listen` reports why
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        try:
            received = os.read(self._process.stdout.fileno(), 65536)
        except BlockingIOError:
            return  # no line: the usual case
        *lines, self._unread = (self._unread + received).split(b"\n")
        for line in map(json.loads, lines):
            if "failed" in line:
                raise TrackerError(f"{line['failed'].rstrip('.')} (more in {self._run.path / LOG})")
            self._say(line["say"])
        if not received:
            self._check_exit()

    def _check_exit(self) -> None:
        assert self._process is not None
        if code := self._process.poll():
            raise TrackerError(f"its process ended with {code} (more in {self._run.path / LOG})")


def wandb_mode(config: TrackerConfig, environ: Mapping[str, str]) -> tuple[str, str]:
    """`online`, `offline` or `disabled`, and why. Raises TrackerError for a WANDB_MODE that is none of W&B's."""
    if config.mode is not None:
        return config.mode, "tracker.mode"
    if environ.get("WANDB_DISABLED", "").lower() in _TRUE:
        return "disabled", "WANDB_DISABLED"
    if given := environ.get("WANDB_MODE"):
        if given not in _WANDB_MODES:
            raise TrackerError(f"WANDB_MODE={given} is not a mode of W&B, which has {', '.join(_WANDB_MODES)}")
        return _WANDB_MODES[given], f"WANDB_MODE={given}"
    if environ.get("WANDB_API_KEY"):
        return "online", "WANDB_API_KEY is set"
    host = urlparse(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    path = Path(environ.get("NETRC") or Path(environ.get("HOME", "~")) / ".netrc").expanduser()
    try:
        if netrc.netrc(path).authenticators(host):
            return "online", f"{path} has a key"
    except FileNotFoundError:
        return "offline", "no API key"
    except (OSError, netrc.NetrcParseError) as error:
        return "offline", f"{path} cannot be read: {error}"
    return "offline", f"no API key, and none in {path}"
