"""The process behind `stoker.trainer.report.trackers`: reads metrics.jsonl as it grows and passes every step to a
tracker once.

Run as a script that imports only the standard library, so that it starts quickly and holds neither torch nor the
training process's memory. It ignores signals for the ranks, and ends when they have ended.
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
from typing import Any, Protocol

POLL_SECONDS = 0.5
LINGER_SECONDS = 60  # after the ranks have ended, uploads and all
CHUNK_BYTES = 1 << 16

Values = dict[str, Any]


class Sink(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self, outcome: str | None) -> None: ...


class Wandb:
    def __init__(self, job: Values, run_id: str, first_step: int, say: Callable[[str], None]) -> None:
        os.environ["WANDB_SILENT"] = "true"
        import wandb

        self._run = wandb.init(
            project=job["project"],
            entity=job["entity"],
            name=job["name"],
            id=run_id,
            resume="allow",
            mode=job["mode"],
            dir=job["run_dir"],
            config=job["config"],
            settings={"console": "off", "x_stats_pid": job["trainer_pid"]},  # system metrics of rank 0, not ours
        )
        if job["mode"] == "online":
            say(f"wandb run at {self._run.url}")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def flush(self) -> None:
        pass  # sends on its own schedule

    def close(self, outcome: str | None) -> None:
        self._run.summary["outcome"] = outcome or "killed"
        self._run.finish(exit_code=0 if outcome in ("completed", "stopped") else 1)


class TensorBoard:
    def __init__(self, job: Values, run_id: str, first_step: int, say: Callable[[str], None]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._session, self._summary = event_pb2.Event, event_pb2.SessionLog, summary_pb2.Summary
        self._writer = EventFileWriter(os.path.join(job["run_dir"], "tensorboard"))
        # Readers drop the steps from here on that older event files hold
        restart = self._session(status=self._session.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=first_step, session_log=restart))

    def log(self, step: int, values: dict[str, float]) -> None:
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars))
        self._writer.add_event(event)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, outcome: str | None) -> None:
        self._writer.close()


SINKS: dict[str, Callable[[Values, str, int, Callable[[str], None]], Sink]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
}


class Memory:
    """`tracker.json`: the tracker's run id and the last step given to it.

    Another tracker, and the tracker of another run whose directory was copied, start from nothing. `run` is the id of
    ours, None where it has none.
    """

    def __init__(self, run_dir: Path, tracker: str, run: str | None, say: Callable[[str], None]) -> None:
        self._path = run_dir / "tracker.json"
        try:
            stored = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            stored = {}
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
        fresh = self._path.with_name("tracker.json.new")
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


def follow(file: io.FileIO, memory: Memory, sink: Sink, ended: threading.Event) -> None:
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
        with open_new(run_dir / "tracker.lock", 0) as lock, open(job["metrics"], "rb", buffering=0) as file:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the tracker of an attempt that was killed
            memory = Memory(run_dir, job["tracker"], job["run"], voice.say)
            sink = SINKS[job["tracker"]](job, memory.run_id, memory.last_step + 1, voice.say)
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
