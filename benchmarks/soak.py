"""A run that meets many random faults, compared with one that meets none.

    python -m benchmarks.soak [--faults 100] [--seed 0]

Kinds: kill -9 of a rank, of all ranks, of the launcher, of a rank in mid-save; SIGSTOP of a rank (a hang); SIGTERM. It
fails unless step, loss, norm, rate and tokens of every step are equal to the last bit, no step stands twice, every
attempt has an outcome and no process is left. Prints how many faults of each kind there were, and the goodput.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from conf.rundir import RunDirectory
from tests.launch.runs import write_text
from tests.launch.soak import Soak
from trainer.goodput import goodput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_text(home / "text")
        soak = Soak(home, options.faults, options.seed)
        began = time.perf_counter()
        soak.execute()
        seconds = time.perf_counter() - began
        soak.check()
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(soak.struck.items()))
        print(f"{options.faults} faults ({kinds}) in {seconds:.0f} s: bitwise the undisturbed run")
        print(f"goodput: {goodput(RunDirectory(soak.run))}")


if __name__ == "__main__":
    main()
