"""What a Prometheus that scrapes often, and an alert command that hangs, cost a step.

    python -m benchmarks.observing [--blocks 60] [--rate 100] [overrides ...]

One run of the tiny model in one process, its endpoint on loopback. In every second block of ten steps this process
scrapes it `--rate` times a second. A block's median step time over that of the blocks before and after is a ratio;
printed are their median and its standard error. The scraper needs processor time: give the run and it a core each.

Then how long a step is held up, in the median and at most of 50 times, when a rollback runs a command that never ends.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from stoker.conf.compose import compose
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.data import prepare
from stoker.trainer.report.metrics import last_step, read
from stoker.trainer.report.trackers import Tracker

BLOCK = 10  # steps
LEFT_OUT = 2  # first and last steps of a block: scrapes begin and end between two looks at the metrics
SETTINGS = ["model=tiny", "seq_len=256", "batch.size=2", "precision=fp32", "log.every=1000", "launch.nproc=1"]
QUIET = ["checkpoint.every=0", "eval.sequences=0", "launch.threads=1", "prometheus.port=1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--rate", type=int, default=100, help="scrapes a second")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "run")
        words = [*SETTINGS, *QUIET, *options.overrides, f"steps={options.blocks * BLOCK}", f"run.dir={run.path}"]
        prepare(compose(words))
        command = [sys.executable, "-P", "-m", "stoker.launch.cli", "train", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as training:
            scrapes = _scrape(training, run, options.rate)
        if training.returncode != 0:
            sys.exit(f"the run ended with status {training.returncode}")
        seconds = [step["step_seconds"] for step in read(run.metrics)]
    blocks = [
        statistics.median(seconds[at + LEFT_OUT : at + BLOCK - LEFT_OUT]) for at in range(BLOCK, len(seconds), BLOCK)
    ]
    ratios = [blocks[at] / ((blocks[at - 1] + blocks[at + 1]) / 2) for at in range(1, len(blocks) - 1, 2)]
    low, cost, high = statistics.quantiles(ratios, n=4)
    error = 1.25 * 0.74 * (high - low) / len(ratios) ** 0.5
    print(
        f"{scrapes:,} scrapes, {options.rate} a second, {len(ratios)} blocks: {cost - 1:+.2%} +- {error:.2%} of a step "
        f"of {statistics.median(blocks) * 1e3:.1f} ms"
    )
    held = sorted(_held_up_by_a_dead_command() for _ in range(50))
    print(f"a rollback with a dead alert command holds a step up {held[25] * 1e3:.2f} ms, {held[-1] * 1e3:.2f} at most")


def _scrape(training: subprocess.Popen[str], run: RunDirectory, rate: int) -> int:
    """Scrapes the run's endpoint in every second block, to its end; how many times."""
    assert training.stdout is not None
    address = next(found[0] for line in training.stdout if (found := re.search(r"http://\S+/metrics", line)))
    done, following = 0, time.monotonic()
    while training.poll() is None:
        step = last_step(run.metrics)
        for _ in range(rate // 10):
            following += 1 / rate
            time.sleep(max(0.0, following - time.monotonic()))
            if step // BLOCK % 2 == 0 and training.poll() is None:
                try:
                    urllib.request.urlopen(address, timeout=10).read()
                except OSError:
                    continue  # it ends with the run
                done += 1
    return done


def _held_up_by_a_dead_command() -> float:
    """Seconds that a rollback takes on the thread that trains, for alerts alone."""
    with tempfile.TemporaryDirectory() as folder:
        run, config = RunDirectory(Path(folder)), Config()
        run.metrics.touch()
        config.alerts.command = "sleep 10"
        tracker = Tracker("alerts", config.tracker, run, say=print)
        tracker.start(config, None, 10, {"attempt": "1"})
        before = tracker._process
        try:
            began = time.perf_counter()
            tracker.rolled_back(3)
            return time.perf_counter() - began
        finally:
            for process in (before, tracker._process):
                if process is not None:
                    process.kill()
                    process.wait()


if __name__ == "__main__":
    main()
