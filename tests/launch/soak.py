"""Random faults over one run, and what must be left of it: shared by the suite and benchmarks/soak.py."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from stoker.conf.rundir import RunDirectory
from stoker.trainer.report.goodput import Goodput, goodput
from stoker.trainer.runtime.outcome import read_ending
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

KINDS = ("rank", "all ranks", "launcher", "hang", "terminate", "mid-save")
HANG_SECONDS = 5  # a busy machine is not to be taken for a hang
STATUS = {"launcher": -signal.SIGKILL, "terminate": 128 + signal.SIGTERM}  # of kinds by which the launcher ends


@dataclass
class Soak:
    """A run under `home` that meets `faults` faults, of kinds and at moments that follow from `seed`; stopped then."""

    home: Path
    faults: int
    seed: int
    struck: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0  # from the first start to the end

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.home / "soaked")

    def words(self, run: Path, steps: int) -> list[str]:
        chosen = [f"steps={steps}", "schedule.total_steps=100", "checkpoint.every=2", "log.every=1000"]
        return overrides(
            run, self.home / "text", *chosen, f"launch.hang_seconds={HANG_SECONDS}", "launch.max_restarts=8"
        )

    def execute(self) -> None:
        """Raises AssertionError where the run does not survive."""
        self._random = random.Random(self.seed)
        kinds = [KINDS[number % len(KINDS)] for number in range(self.faults)]
        self._random.shuffle(kinds)
        began = time.monotonic()
        expected = None
        while expected != 0:
            with started(self.home, command("train", *self.words(self.run.path, 100_000))) as process:
                expected = None
                while kinds and expected is None:
                    kind = kinds.pop(0)
                    self._strike(process, kind)
                    expected = STATUS.get(kind)
                if expected is None:
                    self._come_further(process, 3)
                    self.run.stop.touch()
                    expected = 0
                output, _ = process.communicate(timeout=60)
                wait_until_gone(self.home)
            assert process.returncode == expected, output
        self.seconds = time.monotonic() - began

    def _come_further(self, process: subprocess.Popen[str], steps: int) -> None:
        goal = last_step(self.run.path) + steps
        wait_until(lambda: last_step(self.run.path) >= goal, process)

    def _strike(self, process: subprocess.Popen[str], kind: str) -> None:
        """Wait for some progress, then break something, and for what follows."""
        self._come_further(process, self._random.randrange(1, 4))
        ranks = wait_until(lambda: len(found := rank_pids(self.run.path)) == 2 and found, process)
        if kind == "mid-save":
            wait_until(lambda: any(self.run.checkpoints.glob("*.partial")), process)
        else:
            time.sleep(self._random.random() * 0.1)
        self.struck[kind] += 1
        attempts = len(self.run.attempt_numbers())
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
        if kind not in STATUS:
            wait_until(lambda: len(self.run.attempt_numbers()) > attempts, process)

    def check(self) -> Goodput:
        """Raises AssertionError where something is left that an undisturbed run would not have left; the goodput."""
        reference = self.home / "undisturbed"
        status, output = finish(self.home, command("train", *self.words(reference, last_step(self.run.path))))
        assert status == 0, output
        steps = steps_of(self.run.path)
        assert [step[0] for step in steps] == list(range(1, len(steps) + 1)), "a step is logged twice, or is missing"
        assert steps == steps_of(reference), "not the run that nothing happened to"
        endings = {number: read_ending(self.run, number) for number in self.run.attempt_numbers()}
        assert None not in endings.values(), f"an attempt has no outcome: {endings}"
        assert len(endings) == self.faults + 1, f"a fault costs one attempt: {endings}"
        assert not list(self.run.checkpoints.glob("*.partial"))
        wait_until_gone(self.home)
        return goodput(self.run)
