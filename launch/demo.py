"""`make demo`: train, kill a rank, watch the run recover, resume on another layout, and generate text.

It runs the commands that a user would type and prints each first.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from stoker.conf.rundir import RunDirectory

STEPS, MORE = 320, 20
TARGET = 2.1  # nats per byte on the validation rows
APART = 0.1  # nats per byte between validation and training sequences, which the run has hardly read
TRAIN = ["model=tiny", "precision=fp32", "parallel.zero=3", "launch.nproc=2", f"steps={STEPS}"]
SETTINGS = ["seq_len=256", "batch.size=16", "batch.micro_size=8", "optim.lr=4e-3", "schedule.warmup_steps=20"]
CADENCE = ["checkpoint.every=40", "eval.every=80", "eval.sequences=64", "log.every=20"]


def main() -> int:
    run = RunDirectory(Path(tempfile.mkdtemp(prefix="stoker-demo-")) / "run")
    began = time.monotonic()
    _say(f"A small model learns to write Python from the standard library: 2 ranks, ZeRO 3, {STEPS} steps.")
    training = _start(["train", f"run.dir={run.path}", *TRAIN, *SETTINGS, *CADENCE])
    victim = _wait_for_step(run, training, STEPS // 2 + 5)
    _say(f"Half way. Now rank 1 (process {victim}) is killed with SIGKILL, as a failing machine would.")
    os.kill(victim, signal.SIGKILL)
    if training.wait() != 0:
        return _fail("the run did not recover")
    steps = [step["step"] for step in _metrics(run)]
    if steps != list(range(1, STEPS + 1)):
        return _fail("metrics.jsonl does not hold every step exactly once")
    _say(f"It restarted from its newest checkpoint: metrics.jsonl holds each of its {STEPS} steps once.")

    _say("Its checkpoints:")
    if _start(["checkpoint", "ls", str(run.path)]).wait() != 0:
        return _fail("a checkpoint is damaged")
    _say("Where a run runs does not change what it computes: the same run continues as one process, without ZeRO.")
    resumed = ["train", f"run.dir={run.path}", "launch.nproc=1", "parallel.zero=0", f"steps={STEPS + MORE}"]
    if _start(resumed).wait() != 0:
        return _fail("the run did not resume")
    _say("The model continues a prompt:")
    if _start(["generate", str(run.path), "--prompt", "def ", "--tokens", "300"]).wait() != 0:
        return _fail("the model generated no text")
    wrong = judged(_metrics(run))
    _say(f"{time.monotonic() - began:.0f} s in all. The run directory is {run.path}")
    return 0 if wrong is None else _fail(wrong)


def judged(steps: Sequence[Mapping[str, float]]) -> str | None:
    """Shows the losses of the last evaluation, by lines of metrics.jsonl; what is wrong with them, or None."""
    last = next(step for step in reversed(steps) if "val_loss" in step)
    loss, beside = last["val_loss"], last["train_loss"]
    _say(f"Validation loss {loss:.3f} nats per byte, {beside:.3f} on training sequences with the same weights.")
    if abs(loss - beside) > APART:
        return f"the two losses are more than {APART} apart, after a fraction of an epoch"
    return None if loss < TARGET else f"the validation loss is not under {TARGET}"


def _start(arguments: list[str]) -> subprocess.Popen[bytes]:
    print(f"\n$ stoker {' '.join(arguments)}", flush=True)
    return subprocess.Popen([sys.executable, "-P", "-m", "stoker.launch.cli", *arguments])


def _wait_for_step(run: RunDirectory, training: subprocess.Popen[bytes], step: int) -> int:
    """The process id of rank 1 once the run has come to `step`."""
    while training.poll() is None:
        metrics = _metrics(run)
        if metrics and metrics[-1]["step"] >= step:
            stamp = run.attempt(run.attempt_numbers()[-1]) / "rank-1.stamp"
            return int(stamp.read_text().split()[3])
        time.sleep(0.2)
    sys.exit(_fail("the run ended before its middle"))


def _metrics(run: RunDirectory) -> list[dict[str, float]]:
    from stoker.trainer.report.metrics import read

    return read(run.metrics)


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _fail(text: str) -> int:
    print(f"\nmake demo: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
