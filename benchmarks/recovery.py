"""Seconds from kill -9 of one rank to the next new step, and where they go.

    python -m benchmarks.recovery [--repeats 5] [--limit 10]

Two ranks on this machine, the tiny model, `stoker train`. Detection: until the launcher has recorded the end. Restart:
until ranks of the next attempt are ready (their first stamp: Python and torch are loaded, ranks have connected). Load:
until one of them begins a step. First step: until metrics.jsonl has a step that it did not have before the kill; steps
since the checkpoint are trained again first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.outcome import read_ending
from stoker.trainer.runtime.process import read_stamps
from tests.launch.runs import command, kill, last_step, rank_pids, started, wait_until

PARTS = ("detection", "restart", "load", "first step")
WORDS = [
    "model=tiny", "seq_len=64", "batch.size=8", "steps=100000", "schedule.total_steps=100", "launch.nproc=2",
    "checkpoint.every=5", "launch.max_restarts=1", "log.progress=none",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, help="fail when the median is above so many seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [recovery(Path(folder), repeat) for repeat in range(options.repeats)]
    totals = [sum(parts) for parts in found]
    parts = ", ".join(
        f"{name} {statistics.median(column):.2f}" for name, column in zip(PARTS, zip(*found, strict=True), strict=True)
    )
    median = statistics.median(totals)
    print(f"kill -9 to the next new step: {median:.2f} s ({min(totals):.2f} to {max(totals):.2f}): {parts}")
    sys.exit(options.limit is not None and median > options.limit)


def recovery(home: Path, repeat: int) -> tuple[float, ...]:
    run = home / str(repeat)
    directory = RunDirectory(run)
    with started(home, command("train", f"run.dir={run}", *WORDS)) as process:
        wait_until(lambda: last_step(run) >= 12, process)
        moments = [time.time()]
        kill(rank_pids(run)[1])
        wait_until(lambda: read_ending(directory, 1), process)
        moments.append(time.time())
        seen = last_step(run)
        wait_until(lambda: read_stamps(directory.attempt(2)), process)
        moments.append(time.time())
        wait_until(lambda: any(stamp.step > 0 for stamp in read_stamps(directory.attempt(2)).values()), process)
        moments.append(time.time())
        wait_until(lambda: last_step(run) > seen, process)
        moments.append(time.time())
    return tuple(after - before for before, after in pairwise(moments))


if __name__ == "__main__":
    main()
