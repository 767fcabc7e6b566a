"""Random faults over one run, and what must be left of it: shared by the suite and benchmarks/soak.py."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from conf.rundir import RunDirectory
from tests.launch.runs import (
    command,
    finish,
    kill,
    last_step,
    overrides,
    rank_pids,
    started,
    steps_of,
    wait_until,
    wait_until_gone,
)
from trainer.outcome import read_ending

KINDS = ("rank", "all ranks", "launcher", "hang", "terminate", "mid-save")
STEPS_PER_FAULT = 10  # a fault is struck after one to three; until it is, and seen, some more go by


@dataclass
class Soak:
    """A run under `home` that meets `faults` faults, of kinds and at moments that follow from `seed`."""

    home: Path
    faults: int
    seed: int
    struck: Counter[str] = field(default_factory=Counter)
    starts: int = 0

    @property
    def run(self) -> Path:
        return self.home / "soaked"

    def words(self, run: Path) -> list[str]:
        steps = (self.faults + 2) * STEPS_PER_FAULT
        chosen = [f"steps={steps}", "checkpoint.every=2", f"launch.max_restarts={self.faults + 1}"]
        return overrides(run, self.home / "text", *chosen, "launch.hang_seconds=3", "log.every=1000")

    def execute(self) -> None:
        """Raises AssertionError where the run does not survive."""
        self._random = random.Random(self.seed)
        kinds = [KINDS[number % len(KINDS)] for number in range(self.faults)]
        self._random.shuffle(kinds)
        output = ""
        while True:
            self.starts += 1
            with started(self.home, command("train", *self.words(self.run))) as process:
                while kinds and process.poll() is None:
                    if self._strike(process, kinds.pop(0)):
                        break
                output, _ = process.communicate(timeout=120)
                wait_until_gone(self.home)
            if not kinds and process.returncode == 0 and last_step(self.run) == (self.faults + 2) * STEPS_PER_FAULT:
                return
            assert self.starts <= self.faults + 1, f"it does not come to an end:\n{output}"

    def _strike(self, process: subprocess.Popen[str], kind: str) -> bool:
        """Wait for some progress, then break something; True when the launcher ends by it."""
        run = RunDirectory(self.run)
        before = last_step(self.run)
        goal = before + self._random.randrange(1, 4)
        wait_until(lambda: last_step(self.run) >= goal, process)
        ranks = wait_until(lambda: len(found := rank_pids(self.run)) == 2 and found, process)
        if kind == "mid-save":
            wait_until(lambda: any(run.checkpoints.glob("*.partial")), process)
        else:
            time.sleep(self._random.random() * 0.1)
        self.struck[kind] += 1
        attempts = len(run.attempt_numbers())
        victim = ranks[self._random.randrange(2)]
        if kind == "launcher":
            kill(process.pid)
        elif kind == "terminate":
            kill(process.pid, signal.SIGTERM)
        elif kind == "all ranks":
            for pid in ranks.values():
                kill(pid)
        else:
            kill(victim, signal.SIGSTOP if kind == "hang" else signal.SIGKILL)
        if kind in ("launcher", "terminate"):
            return True
        wait_until(lambda: len(run.attempt_numbers()) > attempts, process)
        return False

    def check(self) -> None:
        """Raises AssertionError where something is left that an undisturbed run would not have left."""
        reference = self.home / "undisturbed"
        status, output = finish(self.home, command("train", *self.words(reference)))
        assert status == 0, output
        steps = steps_of(self.run)
        assert [step[0] for step in steps] == sorted({step[0] for step in steps}), "a step is logged twice"
        assert steps == steps_of(reference), "not the run that nothing happened to"
        run = RunDirectory(self.run)
        for attempt in run.attempt_numbers():
            assert read_ending(run, attempt) is not None, f"attempt {attempt} has no outcome"
        assert not list(run.checkpoints.glob("*.partial"))
        wait_until_gone(self.home)
