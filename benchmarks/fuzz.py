"""Mutated files of all kinds through the commands and readers that take files of others.

    python benchmarks/fuzz.py [--seed 0] [--count 5000]

Run directories, checkpoints, metrics, books, tokenizers, texts, tables, archives and token files. The test suite reads
some hundreds; this reads thousands. It ends at the first file that runs code, opens a file elsewhere, takes longer than
five seconds of processor time or ends in another error than one line for the user.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the harness is the tests'

from tests.fuzzing import fuzz


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=5000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(Path(folder), options.seed, options.count, lambda line: print(line, flush=True))
    for name, number in sorted(found.items()):
        print(f"{name:28} {number:6,}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


if __name__ == "__main__":
    main()
