"""Mutated files of all kinds through the commands and readers that take files of others.

    python benchmarks/fuzz.py [--seed 0] [--first 0] [--count 5000]

Run directories, through status, logs, checkpoint, generate, data peek, export and replay; checkpoints, metrics, books,
tokenizers, chat templates, conversations, texts, tables, archives, token files, and models of Hugging Face's with their
configs. The test suite reads some hundreds; this reads thousands. It fails, after the last file, if any of them runs
code, opens a file elsewhere, takes more than five seconds of processor time or a gibibyte, or ends in another error
than one line for the user.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the harness is the tests'

from tests.fuzz_subjects import SUBJECTS
from tests.fuzzing import fuzz


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file, to go on with a long run")
    parser.add_argument("--count", type=int, default=5000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        numbers = range(options.first, options.first + options.count)
        found = fuzz(Path(folder), SUBJECTS, options.seed, numbers, lambda line: print(line, flush=True))
    for name, number in sorted(found.items()):
        print(f"{name:28} {number:6,}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


if __name__ == "__main__":
    main()
