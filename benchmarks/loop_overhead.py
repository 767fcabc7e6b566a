"""Tokens per second of `stoker train` over those of a hand-written minimal torch loop (benchmarks/minimal_loop.py).

    python benchmarks/loop_overhead.py [--repeats 5] [--steps 40] [--layouts 1/0 2/0 2/1 2/2 2/3]

Each repeat runs the two as whole processes, one after the other and in alternating order; a repeat gives the ratio of
their median step times after a warm-up, and the line printed is the median of the ratios with their range. On CPUs
ranks run with the machine's cores divided among them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from stoker.conf.compose import compose
from stoker.conf.schema import Config, to_dict
from stoker.data import open_rows, prepare, vocabulary
from stoker.trainer.report.metrics import read

WARMUP = 8  # steps left out of the medians
SETTINGS = ["model=tiny", "seq_len=256", "batch.size=32", "batch.micro_size=8", "precision=bf16", "log.every=1000"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--layouts", nargs="*", default=["1/0", "2/0", "2/1", "2/2", "2/3"], help="ranks/zero")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for layout in options.layouts:
            ranks, zero = map(int, layout.split("/"))
            words = [*SETTINGS, f"steps={options.steps}", f"parallel.zero={zero}", f"launch.nproc={ranks}"]
            config = compose([*words, "checkpoint.every=0"])
            prepare(config)
            ratios, speeds = [], []
            for repeat in range(options.repeats):
                run = Path(folder) / f"{ranks}-{zero}-{repeat}"
                run.mkdir()
                pair = [lambda: ours(words, run), lambda: peer(config, run, ranks)]  # noqa: B023
                first = repeat % 2
                seconds = {first: pair[first](), 1 - first: pair[1 - first]()}
                ratios.append(seconds[1] / seconds[0])
                speeds.append(config.batch.size * config.seq_len / seconds[0])
            print(
                f"{ranks} rank{'s' * (ranks > 1)}, ZeRO {zero}: ratio {statistics.median(ratios):.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f}), stoker {statistics.median(speeds):,.0f} tokens/s",
                flush=True,
            )


def ours(words: list[str], run: Path) -> float:
    """Median seconds of a step of `stoker train`."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "stoker.launch.cli",
        "train",
        f"run.dir={run}/run",
        *words,
        "checkpoint.every=0",
    ]
    _run(command)
    return statistics.median(step["step_seconds"] for step in read(run / "run" / "metrics.jsonl")[WARMUP:])


def peer(config: Config, run: Path, ranks: int) -> float:
    """Median seconds of a step of the hand-written loop."""
    config.model.vocab_size = vocabulary(config)
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    open_rows(config, "train").tokens.ids.tofile(run / "tokens")
    files = [str(run / name) for name in ("config.json", "tokens", "out")]
    script = [str(Path(__file__).with_name("minimal_loop.py")), *files]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    _run([sys.executable, *launcher, *script])
    return statistics.median(json.loads((run / "out").read_text())[WARMUP:])


def _run(command: list[str]) -> None:
    cores = len(os.sched_getaffinity(0))
    settings = {"OMP_NUM_THREADS": str(cores), "GOMP_SPINCOUNT": "5000"}  # the second as trainer.__main__ sets it
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    if ended.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}")


if __name__ == "__main__":
    main()
