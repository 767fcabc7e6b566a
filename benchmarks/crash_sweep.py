"""SIGKILL, EIO and ENOSPC at the N-th write, fsync, rename, mkdir and unlink of either rank of a save, for every N.

    python benchmarks/crash_sweep.py [--rounds 3] [--calls write fsync] [--effects signal=SIGKILL error=EIO]

The test suite does one round of the most important ones; this repeats all of them. After each failure a resume must
find the checkpoint before or the new one, bit for bit. Needs strace.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the harness is the tests'

from tests.checkpoint.crash import CALLS, GRID, check_what_is_left, new_run, strike, why_not

EFFECTS = ("signal=SIGKILL", "error=EIO", "error=ENOSPC")
MOST = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", nargs="*", default=list(CALLS), choices=list(CALLS))
    parser.add_argument("--effects", nargs="*", default=list(EFFECTS))
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    for effect in options.effects:
        for call in options.calls:
            found: collections.Counter[int] = collections.Counter()
            for _ in range(options.rounds):
                for rank in range(GRID.world):
                    found += sweep(rank, call, effect)
            print(
                f"{effect:15} {call:7} {sum(found.values()):4} blows: step 1 {found[1]}, step 2 {found[2]}", flush=True
            )


def sweep(rank: int, call: str, effect: str) -> collections.Counter[int]:
    """What a resume found after each blow, until there is no such call any more."""
    found: collections.Counter[int] = collections.Counter()
    for number in range(1, MOST):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "checkpoints"
            new_run(directory)
            blow = strike(directory, rank, call, number, effect)
            step = check_what_is_left(directory, blow)
            if not blow.struck:
                break
            found[step] += 1
    return found


if __name__ == "__main__":
    main()
