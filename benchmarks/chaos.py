"""One run through random layouts, engines, readers and disturbances, compared with one undisturbed process.

    python -m benchmarks.chaos [--seed 0] [--episodes 25] [--data jsonl tar] [--starts 0]

An episode is one start of the run. Disturbances: kill -9 of a rank, a reader, all ranks, the launcher (also while it
starts), all processes, or a rank in mid-save; SIGSTOP of a rank (for less than a hang, and for good) and of all;
SIGTERM; a full disk; a clock that jumps; a damaged checkpoint; a run directory that is moved or copied. It fails unless
every step is in the metrics once, with the tokens, sequences and learning rate of the undisturbed process and a loss
within 1e-3, every attempt has an outcome, and no process, temporary folder or shared memory is left.

With `--starts N` one run is also started by two launchers N times, up to four seconds apart: exactly one may train.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the harness is the tests'

from tests.launch.chaos import FREEZES, KILLS, Chaos
from tests.launch.double_starts import started_twice
from tests.launch.runs import last_step

LATEST_SECONDS = 4.0  # by which the second launcher is late at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=25)
    parser.add_argument("--data", nargs="*", default=["jsonl", "tar"], choices=["jsonl", "tar"])
    parser.add_argument("--starts", type=int, default=0)
    options = parser.parse_args()
    for data in options.data:
        with tempfile.TemporaryDirectory() as folder:
            chaos = Chaos(Path(folder), options.episodes, options.seed, data, say=lambda line: print(line, flush=True))
            chaos.execute()
            spent = chaos.check()
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(chaos.struck.items()))
            kills, freezes = (sum(chaos.struck[kind] for kind in group) for group in (KILLS, FREEZES))
            print(
                f"{data}, seed {options.seed}: {options.episodes} episodes ({kinds}), {kills} of them kills and "
                f"{freezes} freezes, {len(chaos.run.attempt_numbers())} attempts, {last_step(chaos.run.path)} steps in "
                f"{chaos.seconds:.0f} s: {chaos.different} steps differ, the loss by {chaos.worst:.1e} at most"
            )
            print(f"goodput: {spent}", flush=True)
    if options.starts:
        chance, began = random.Random(options.seed), time.monotonic()
        offsets = [chance.random() * LATEST_SECONDS * (number > 0) for number in range(options.starts)]
        with tempfile.TemporaryDirectory() as folder:
            found = started_twice(Path(folder), offsets)
        counts = ", ".join(f"{count} times {what}" for what, count in found.items())
        print(f"{options.starts} double starts in {time.monotonic() - began:.0f} s: {counts}; bitwise one run")


if __name__ == "__main__":
    main()
