"""Runs as jobs of the cluster that tests start (`tests.launch.cluster`), and what they are compared with."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.outcome import Ending, read_ending
from tests.launch import cluster
from tests.launch.runs import command, environment, last_step, overrides, steps_of, wait_until_gone, write_text

ROOT = Path(__file__).parents[2]
FOUR = ["launch.threads=1", "parallel.zero=2", "schedule.total_steps=30", "checkpoint.every=20", "log.every=20"]
SLOW = "model.target=tests.launch.slow:build"
UNDISTURBED_STEPS = 150


@dataclass(frozen=True)
class Home:
    """A folder with texts and a cluster; what jobs start inherits its cache, and is looked for by it."""

    path: Path
    reference: subprocess.Popen[bytes]

    def undisturbed(self, steps: int) -> list[tuple[Any, ...]]:
        """The first `steps` of a run of four ranks on this machine that nothing happens to."""
        assert self.reference.wait(60) == 0
        found = steps_of(self.path / "undisturbed")[:steps]
        assert len(found) == steps
        return found

    def call(self, *words: str) -> tuple[int, str]:
        """Run a command as a user of the cluster would; (exit status, all output)."""
        ended = subprocess.run(
            words, cwd=ROOT, env={**environment(self.path), "STOKER_PYTHON": sys.executable}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return ended.returncode, ended.stdout

    def submit(self, run: Path, *more: str) -> list[str]:
        """`stoker submit` on two nodes of two ranks; the numbers of the jobs."""
        slow = [*FOUR, SLOW, "launch=slurm", "launch.nodes=2", "launch.nproc=2", "launch.cpus=2"]
        status, output = self.call(*command("submit", *overrides(run, self.path / "text", *slow, *more)))
        assert status == 0, output
        return output.split(" as job ")[1].split(";")[0].split(", then ")


@contextmanager
def at_home(path: Path) -> Iterator[Home]:
    write_text(path / "text")
    words = overrides(path / "undisturbed", path / "text", *FOUR, f"steps={UNDISTURBED_STEPS}", "launch.nproc=4")
    other = {**environment(path), "XDG_CACHE_HOME": str(path / "other-cache")}
    reference = subprocess.Popen(command("train", *words), env=other, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=-3)
    try:
        with cluster.running(path / "cluster"):
            yield Home(path, reference)
            subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], check=True)
            wait_until_gone(path, 20)
    finally:
        reference.kill()
        reference.wait()


def log_of(run: Path) -> str:
    return "\n".join(path.read_text() for path in RunDirectory(run).slurm.glob("*.log"))


def come_to(run: Path, step: int, seconds: float = cluster.PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while last_step(run) < step:
        assert time.monotonic() < deadline, f"at step {last_step(run)} after {seconds:.0f} s:\n{log_of(run)}"
        time.sleep(0.1)


def ending_of(run: Path, attempt: int) -> Ending:
    """How the attempt of this number ends."""
    directory = RunDirectory(run)
    cluster.wait(lambda: attempt in directory.attempt_numbers(), f"no attempt {attempt}", lambda: log_of(run))
    ending: Ending = cluster.wait(lambda: read_ending(directory, attempt), "no outcome", lambda: log_of(run))
    return ending
