"""One run taken through random layouts and disturbances, and what must be left of it: shared by the suite and
benchmarks/chaos.py.

An episode is one start of the run on a random layout, engine and number of readers, with one disturbance before it or
while it trains. At the end the run is compared with one undisturbed process.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from stoker.checkpoint import newest
from stoker.conf.rundir import RunDirectory
from stoker.trainer.report.goodput import Goodput, goodput
from stoker.trainer.report.metrics import read
from stoker.trainer.runtime.outcome import read_ending
from tests.launch.runs import (
    SMALL,
    command,
    kill,
    last_step,
    processes_of,
    rank_pids,
    started,
    train_here,
    wait_until,
    wait_until_gone,
)

WHOLE = ["parallel.engine=fsdp", "parallel.tp=1", "parallel.pp=1", "parallel.zero=1"]  # else those of the last start
LAYOUTS = [  # ranks, settings
    (1, []),
    *((2, [f"parallel.zero={zero}"]) for zero in range(4)),
    (2, ["parallel.tp=2"]),
    (2, ["parallel.pp=2", "parallel.zero=0"]),
    *((2, ["parallel.engine=deepspeed", f"parallel.zero={zero}"]) for zero in (1, 3)),
    (4, ["parallel.tp=2", "parallel.zero=2"]),
]
BEFORE = ("damage", "move", "copy")  # disturbances before a start; the others come while it trains
KILLS = ("rank", "reader", "all ranks", "everything", "launcher", "launcher in start-up", "mid-save")
FREEZES = ("hang", "freeze", "freeze all")
KINDS = (*KILLS, *FREEZES, "terminate", "disk full", "clock", *BEFORE)
COMPARED = ("step", "updates", "lr", "tokens", "first_row", "skipped")  # equal on every layout, unlike sums
LOSS_TOLERANCE = 1e-3

HANG_SECONDS = 8  # a busy machine is not to be taken for a hang
FREEZE_SECONDS = 11.0  # of all: longer than a hang, and than a watchdog may be late (watchdog.LATE_SECONDS)
START_SECONDS = 4.0  # in which a launcher may be killed while it starts
PATIENCE = 600.0  # seconds until a run must have come further, also on a busy machine
STATUS = {"launcher": -signal.SIGKILL, "everything": -signal.SIGKILL, "terminate": 128 + signal.SIGTERM}
CLOCK_VARIABLE = "STOKER_TEST_CLOCK"
CLOCK = f"""
import os, time
_real, _path = time.time, os.environ["{CLOCK_VARIABLE}"]
def _jumped():
    try:
        with open(_path) as file:
            return _real() + float(file.read() or 0)
    except (OSError, ValueError):
        return _real()
time.time = _jumped
"""


@dataclass
class Chaos:
    """A run under `home` that goes through `episodes`, which follow from `seed`; stopped at the end.

    `data`: `jsonl`, counted and indexed, or `tar`, read as streams. Every kind of disturbance occurs before one occurs
    again.
    """

    home: Path
    episodes: int
    seed: int
    data: str = "jsonl"
    kinds: Sequence[str] = KINDS
    say: Callable[[str], None] = lambda _: None
    struck: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0  # from the first start to the end
    worst: float = 0.0  # the largest difference of a loss
    different: int = 0  # steps

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.seed}-{self.data}")
        self.run = RunDirectory(self.home / "run")
        self._ranks = 0  # of this start
        self._waiting: list[str] = []  # kinds that have not occurred in this round
        for folder in ("tmp", "clock", "text"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        (self.home / "clock" / "sitecustomize.py").write_text(CLOCK)
        _write_data(self.home / "text", self.data)
        self._shared_before = _shared_memory()

    def execute(self) -> None:
        """Raises AssertionError where the run does not survive."""
        began = time.monotonic()
        for number in range(1, self.episodes + 1):
            kind = self._next_kind()
            if kind in BEFORE:
                self._disturb(kind)
            self._start(None if kind in BEFORE else kind, last=number == self.episodes)
            self.say(f"episode {number}: {kind}, {self._layout} {self._words[-2:]}, at step {last_step(self.run.path)}")
        self.seconds = time.monotonic() - began

    def check(self) -> Goodput:
        """Raises AssertionError where something is left that an undisturbed run would not have left; the goodput."""
        wait_until_gone(self.home)
        reference = self.home / "undisturbed"
        train_here(self.home, self._settings(reference, last_step(self.run.path), (1, []), ["data.workers=0"]))
        found, expected = (read(RunDirectory(path).metrics) for path in (self.run.path, reference))
        assert [step["step"] for step in found] == list(range(1, len(expected) + 1)), "a step is missing, or twice"
        for here, there in zip(found, expected, strict=True):
            self.worst = max(self.worst, abs(here["loss"] - there["loss"]))
            same = all(here[key] == there[key] for key in COMPARED)
            self.different += not (same and abs(here["loss"] - there["loss"]) < LOSS_TOLERANCE)
        assert not self.different, f"{self.different} steps differ, a loss by {self.worst}"
        endings = {number: read_ending(self.run, number) for number in self.run.attempt_numbers()}
        assert None not in endings.values(), f"an attempt has no outcome: {endings}"
        left = [*self.run.checkpoints.glob("*.*"), *self.run.path.rglob("*.tmp"), *self.run.attempts.glob(".*")]
        left += (self.home / "tmp").iterdir()
        assert not left, f"left behind: {left}"
        assert not (names := _abandoned(_shared_memory() - self._shared_before)), f"in shared memory: {names}"
        return goodput(self.run)

    def _next_kind(self) -> str:
        """Those that need a checkpoint to be there wait for one."""
        if not self._waiting:
            self._waiting = self._random.sample(self.kinds, len(self.kinds))
        ready = [kind for kind in self._waiting if kind not in BEFORE or len(newest(self.run.checkpoints)) > 1]
        kind = (ready or ["rank"])[0]
        if kind in self._waiting:
            self._waiting.remove(kind)
        self.struck[kind] += 1
        return kind

    def _settings(self, run: Path, steps: int, layout: tuple[int, list[str]], more: Sequence[str]) -> list[str]:
        """The words of a start: those of SMALL, of the data, of the layout, and `more`, which wins."""
        words = [
            *SMALL, f"run.dir={run}", f"steps={steps}", "schedule.total_steps=100", "checkpoint.every=2",
            "log.every=1000", "optim.lr=1e-3", f"launch.hang_seconds={HANG_SECONDS}", "launch.max_restarts=8",
            *(_STREAMED if self.data == "tar" else []), *(word.format(self.home / "text") for word in _DATA[self.data]),
            f"launch.nproc={layout[0]}", *WHOLE, *layout[1], *more,
        ]  # fmt: skip
        return list({word.partition("=")[0]: word for word in words}.values())

    def _start(self, kind: str | None, last: bool) -> None:
        """One start of the run with a disturbance while it trains, or none, to its end."""
        self._layout = self._random.choice(LAYOUTS)
        least = 1 if kind == "reader" else 0
        self._words = [f"checkpoint.mode={self._random.choice(('async', 'sync'))}"]
        self._words += [f"data.workers={self._random.randrange(least, 3)}"]
        full = ""
        if kind == "disk full":
            at, rank = last_step(self.run.path) + 2, self._random.randrange(self._layout[0])
            full = f"{{at: {at}, rank: {rank}, do: disk_full}}"
        self._words.append(f"faults=[{full}]")  # a run keeps them, and not every layout has that rank
        place = {"TMPDIR": self.home / "tmp", "PYTHONPATH": self.home / "clock", CLOCK_VARIABLE: self._clock}
        place["TORCHINDUCTOR_CACHE_DIR"] = self.home / "cache" / "inductor"  # else in TMPDIR, to be kept
        words = self._settings(self.run.path, 100_000, self._layout, self._words)
        environment = [f"{name}={value}" for name, value in place.items()]
        with started(self.home, ["env", *environment, *command("train", *words)]) as process:
            expected = self._strike(process, kind) if kind is not None else None
            if expected is None:
                self._come_further(process, 3)
                expected = self._end(process, last)
            output, _ = process.communicate(timeout=PATIENCE)
            wait_until_gone(self.home)
        assert process.returncode == expected, f"{kind}, {words}: {process.returncode}\n{output}"
        if last and kind in STATUS | {"launcher in start-up": 0}:
            self._start(None, last=True)

    @property
    def _clock(self) -> Path:
        """The file with the seconds by which the clock of the run's processes is wrong."""
        return self.home / "clock" / "seconds"

    def _end(self, process: subprocess.Popen[str], orderly: bool) -> int:
        """End the run in one of the ways in which a run ends; the status to expect."""
        way = "stop" if orderly else self._random.choice(("stop", "terminate", "launcher"))
        if way == "stop":
            self.run.stop.touch()
            return 0
        kill(process.pid, signal.SIGTERM if way == "terminate" else signal.SIGKILL)
        return STATUS[way]

    def _come_further(self, process: subprocess.Popen[str], steps: int) -> None:
        goal = last_step(self.run.path) + steps
        wait_until(lambda: last_step(self.run.path) >= goal, process, PATIENCE)

    def _strike(self, process: subprocess.Popen[str], kind: str) -> int | None:
        """Wait for some progress, then break something, and for what follows; the status to expect if it ends here."""
        if kind == "launcher in start-up":
            time.sleep(self._random.random() * START_SECONDS)
            kill(process.pid)
            return -signal.SIGKILL
        self._come_further(process, self._random.randrange(1, 4))
        ranks = wait_until(lambda: len(found := rank_pids(self.run.path)) == self._layout[0] and found, process)
        victim = ranks[self._random.randrange(len(ranks))]
        attempts = len(self.run.attempt_numbers())
        if kind == "mid-save":
            wait_until(lambda: any(self.run.checkpoints.glob("*.partial")), process, PATIENCE)
        else:
            time.sleep(self._random.random() * 0.1)
        if kind in STATUS:
            pids = processes_of(self.home) if kind == "everything" else [process.pid]
            for pid in pids:
                kill(pid, signal.SIGTERM if kind == "terminate" else signal.SIGKILL)
            return STATUS[kind]
        if kind == "clock":
            self._clock.write_text(str(self._random.choice((-1, 1)) * self._random.randrange(60, 100_000)))
        elif kind in ("freeze", "freeze all"):
            self._freeze([victim] if kind == "freeze" else processes_of(self.home), kind, process, attempts)
        elif kind != "disk full":
            readers = wait_until(lambda: children_of(ranks.values()), process) if kind == "reader" else [victim]
            for pid in ranks.values() if kind == "all ranks" else readers[:1]:
                kill(pid, signal.SIGSTOP if kind == "hang" else signal.SIGKILL)
            wait_until(lambda: len(self.run.attempt_numbers()) > attempts, process, PATIENCE)
        return None

    def _freeze(self, pids: Sequence[int], kind: str, process: subprocess.Popen[str], attempts: int) -> None:
        """Stop processes and let them continue: a rank for less than a hang, or all for longer."""
        for pid in pids:
            kill(pid, signal.SIGSTOP)
        time.sleep(FREEZE_SECONDS if kind == "freeze all" else HANG_SECONDS / 8)
        for pid in pids:
            kill(pid, signal.SIGCONT)
        self._come_further(process, 1)
        assert len(self.run.attempt_numbers()) == attempts, f"{kind} was taken for a hang"

    def _disturb(self, kind: str) -> None:
        """Damage the newest checkpoint, or move or copy the run directory, while the run does not run."""
        if kind == "damage":
            files = sorted(path for path in newest(self.run.checkpoints)[0].iterdir() if path.stat().st_size)
            path = self._random.choice(files)
            content = bytearray(path.read_bytes())
            content[self._random.randrange(len(content))] ^= 1 << self._random.randrange(8)
            path.write_bytes(content)
            return
        there = RunDirectory(self.home / f"run-{self.struck['move']}-{self.struck['copy']}")
        if kind == "move":
            self.run.path.rename(there.path)
        else:
            shutil.copytree(self.run.path, there.path, symlinks=True)
        self.run = there


_STREAMED = ["data.streams=4", "data.split_bytes=1024", "data.shuffle_window=2", "data.assign_every=2"]
_DATA = {
    "jsonl": ["data=text", "data.path={0}"],
    "tar": ["data=webdataset", "data.urls={0}/{{0..2}}.tar", "data.validation=0"],
}


def _write_data(folder: Path, kind: str) -> None:
    """Three files of forty small documents of very unequal length."""
    texts = [f"document {number} has {number * number % 97} words. " * (1 + number * 7 % 13) for number in range(120)]
    for shard in range(3):
        own = list(enumerate(texts))[shard::3]
        if kind == "jsonl":
            (folder / f"{shard}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _, text in own))
            continue
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number, text in own:
                entry = tarfile.TarInfo(f"{number:04}.txt")
                entry.size = len(text)
                archive.addfile(entry, io.BytesIO(text.encode()))


def children_of(pids: Sequence[int] | object) -> list[int]:
    """The child processes of these: a rank's are its readers."""
    parents, found = set(pids), []  # type: ignore[call-overload]
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) in parents:
                    found.append(int(entry.name))
    return found


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def _abandoned(names: set[str]) -> set[str]:
    """Those in /dev/shm that no living process has open or mapped."""
    held = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                held |= {os.readlink(file) for file in (entry / "fd").iterdir()}
                held |= {line.split()[-1] for line in (entry / "maps").read_text().splitlines() if "/dev/shm/" in line}
    return {name for name in names if f"/dev/shm/{name}" not in held}
