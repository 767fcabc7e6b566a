"""A run with many random failures, compared with one without any.

    python -m benchmarks.soak [--faults 100] [--seed 0]

Kinds: kill -9 of a rank, of all ranks, of the launcher, of a rank in mid-save; SIGSTOP of a rank (a hang); SIGTERM. It
fails unless step, loss, norm, rate and tokens of every step are equal to the last bit, no step occurs twice, every
fault costs one attempt, every attempt has an outcome and no process is left. Prints how many faults of each kind there
were, and the goodput.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.launch.runs import last_step, write_text
from tests.launch.soak import Soak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_text(home / "text")
        soak = Soak(home, options.faults, options.seed)
        soak.execute()
        spent = soak.check()
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(soak.struck.items()))
        steps = last_step(soak.run.path)
        print(
            f"{options.faults} faults ({kinds}) over {steps} steps in {soak.seconds:.0f} s: as if nothing had happened"
        )
        print(f"goodput: {spent}")


if __name__ == "__main__":
    main()
