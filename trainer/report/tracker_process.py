"""The process behind `stoker.trainer.report.trackers`: reads metrics.jsonl as it grows and passes every step to a
tracker once.

It imports no torch, so that it starts quickly and holds none of the memory of the training process. It ignores signals
for the ranks, and ends when they have ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import secrets
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from stoker.trainer.report.tracker_sinks import Csv, Mlflow, Sink, TensorBoard, Values, Wandb

POLL_SECONDS = 0.5
LINGER_SECONDS = 60  # after the ranks have ended, uploads and all
CHUNK_BYTES = 1 << 16
MakeSink = Callable[[Values, str, int, Callable[[str], None]], Sink]
SINKS: dict[str, MakeSink] = {"wandb": Wandb, "tensorboard": TensorBoard, "mlflow": Mlflow, "csv": Csv}


class Memory:
    """`tracker-NAME.json`: the tracker's run id and the last step given to it.

    The tracker of another run whose directory was copied starts from nothing. `run` is the id of ours, None where it
    has none.
    """

    def __init__(self, run_dir: Path, tracker: str, run: str | None, say: Callable[[str], None]) -> None:
        self._path = run_dir / f"tracker-{tracker}.json"
        stored = _read(self._path) or _read(run_dir / "tracker.json")  # of versions that had one tracker
        copied = stored.get("run", run) != run  # none: written before runs had an id
        if copied and stored.get("tracker") == tracker:
            say(f"a new {tracker} run: this run directory is a copy of the one of {tracker} run {stored.get('run_id')}")
        if stored.get("tracker") != tracker or copied:
            stored = {"tracker": tracker, "run_id": secrets.token_hex(4), "last_step": 0}
        stored["run"] = run
        self._values: Values = stored
        self.advance(self.last_step)

    @property
    def run_id(self) -> str:
        return self._values["run_id"]

    @property
    def last_step(self) -> int:
        return self._values["last_step"]

    def advance(self, step: int) -> None:
        self._values["last_step"] = step
        fresh = self._path.with_name(f"{self._path.name}.new")
        while True:
            try:
                with open_new(fresh, os.O_TRUNC) as file:
                    file.write(json.dumps(self._values).encode())
                os.replace(fresh, self._path)
                return
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
            time.sleep(POLL_SECONDS)  # no process waits for this one: there may be room later


def sink_of(name: str) -> MakeSink:
    """The sink of a tracker, or of `prometheus` or `alerts`, which alone import rooms of ours."""
    if name == "prometheus":
        from stoker.trainer.report.endpoint import Prometheus

        return Prometheus
    if name == "alerts":
        from stoker.trainer.report.alerts import Alerts

        return Alerts
    return SINKS[name]


class Forgetful:
    """In the place of `Memory` for what shows the present: it gets every line of the file."""

    run_id, last_step = "", 0

    def advance(self, step: int) -> None:
        pass


def _read(path: Path) -> Values:
    try:
        stored = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def open_new(path: Path, flags: int) -> io.FileIO:
    """A file of the run directory to write to. Raises OSError for a link."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | flags, 0o644), "wb", buffering=0)


class RanksEnded:
    """Waits in a thread for the outcome on stdin, or for the end of the process that would send it."""

    def __init__(self, trainer_pid: int) -> None:
        self.outcome: str | None = None
        self.event = threading.Event()
        threading.Thread(target=self._watch, args=(trainer_pid,), daemon=True).start()

    def _watch(self, trainer_pid: int) -> None:
        # Forked data workers may hold the other end of stdin open: check the parent too
        while os.getppid() == trainer_pid:
            if select.select([0], [], [], POLL_SECONDS)[0]:
                line = os.read(0, CHUNK_BYTES)
                self.outcome = json.loads(line)["outcome"] if line else None
                break
        signal.alarm(LINGER_SECONDS)  # ends this process even if it hangs
        self.event.set()


def follow(file: io.FileIO, memory: Memory | Forgetful, sink: Sink, ended: threading.Event) -> None:
    """Give the steps of `file` after `memory.last_step` to `sink`, until the ranks have ended and all is given.

    A file that became shorter belongs to another attempt, whose tracker continues.
    """
    rest = b""
    while True:
        last_look = ended.is_set()
        if os.fstat(file.fileno()).st_size < file.tell():
            return
        while chunk := file.read(CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for values in map(json.loads, lines):
                if values["step"] > memory.last_step:
                    # Noted before it is given: after a kill in between it is missing rather than there twice
                    memory.advance(values["step"])
                    sink.log(values["step"], numbers(values))
        sink.flush()
        if last_look:
            return
        ended.wait(POLL_SECONDS)


def numbers(values: Values) -> dict[str, float]:
    """The numbers of a line."""
    return {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}


class Voice:
    """Lines for rank 0, on the original standard output; the tracker's prints go to the log instead."""

    def __init__(self) -> None:
        self._pipe = os.dup(1)  # open until the process ends: its end of file means to rank 0 that no line follows
        os.dup2(2, 1)

    def say(self, text: str, kind: str = "say") -> None:
        with contextlib.suppress(BrokenPipeError):  # rank 0 has ended
            os.write(self._pipe, json.dumps({kind: text}).encode() + b"\n")


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    voice = Voice()
    try:
        with open(0, "rb", buffering=0, closefd=False) as stdin:  # unbuffered: the next line is for `RanksEnded`
            job = json.loads(stdin.readline())
        ended = RanksEnded(job["trainer_pid"])
        run_dir = Path(job["run_dir"])
        with (
            open_new(run_dir / f"tracker-{job['tracker']}.lock", 0) as lock,
            open(job["metrics"], "rb", buffering=0) as file,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the tracker of an attempt that was killed
            memory = Memory(run_dir, job["tracker"], job["run"], voice.say) if job["once"] else Forgetful()
            sink = sink_of(job["tracker"])(job, memory.run_id, memory.last_step + 1, voice.say)
            follow(file, memory, sink, ended.event)
            sink.close(ended.outcome)
    except Exception as error:
        traceback.print_exc()
        voice.say(f"{type(error).__name__}: {error}".partition("\n")[0], kind="failed")
        signal.alarm(LINGER_SECONDS)  # the tracker's exit hooks may hang
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
