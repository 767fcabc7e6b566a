"""Step times that `stoker plan` predicts beside measured ones: eight layouts of two ranks on this machine.

    python benchmarks/plan_times.py [--machine machine.json] [--model tiny] [--rows 8] [--seq-len 128] [--rounds 5] ...

Predictions go by this machine's own rates: those that `stoker probe --quick` finds for the same model and precision on
two ranks, or those of a given `machine.json`. Each round probes and then runs every layout in processes of its own, as
a shared machine is now faster and now slower; predicted and measured are medians over the rounds. Goal: every layout
within 25%, and the one that is predicted to be fastest within 10% of the fastest.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from ranks import Stoker, batches, model_of, run, steps_of, turn_of

from stoker.conf.devices import device_named
from stoker.conf.schema import BatchConfig, Config, OptimConfig, ParallelConfig
from stoker.parallel.mesh import Mesh
from stoker.trainer.plan.make import Asked, Machine, make_plan
from stoker.trainer.runtime.process import keep_freed_memory

RANKS = 2
LAYOUTS = {
    "ZeRO 0": ParallelConfig(zero=0),
    "ZeRO 1": ParallelConfig(zero=1),
    "ZeRO 2": ParallelConfig(zero=2),
    "ZeRO 3": ParallelConfig(zero=3),
    "tp 2": ParallelConfig(zero=0, tp=2),
    "tp 2, whole norms": ParallelConfig(zero=0, tp=2, sequence_parallel=False),
    "pp 2": ParallelConfig(zero=0, pp=2),
    "cp 2": ParallelConfig(zero=0, cp=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", help="of `stoker probe`; default: measured in each round, with --quick")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--micro", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3, help="of a layout in a round")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    options = parser.parse_args()
    said: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    seen: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            device = device_named(options.machine or _probed(Path(folder) / "machine.json", options))
        for name, parallel in LAYOUTS.items():
            config = _config(parallel, options)
            times = make_plan(config, RANKS, Machine("cpu", device), Asked()).times
            if times is None:
                sys.exit(f"{options.machine} has no rates in {options.precision}")
            said[name].append(times.step.total)
            seen[name].append(statistics.median(run(_measured, config, RANKS, options)[0]))
    found = {name: (statistics.median(said[name]), statistics.median(seen[name])) for name in LAYOUTS}
    print("| layout | predicted (range) | measured (range) | measured / predicted |\n| --- | --- | --- | --- |")
    for name, (predicted, measured) in found.items():
        cells = [_ranged(predicted, said[name]), _ranged(measured, seen[name]), f"{measured / predicted:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    worst = max(max(measured / predicted, predicted / measured) for predicted, measured in found.values())
    first = min(found, key=lambda name: found[name][0])
    over = found[first][1] / min(measured for _, measured in found.values())
    print(f"\nworst: off by a factor of {worst:.2f}; ranked first: {first}, {over:.2f} of the fastest measured")


def _ranged(middle: float, values: list[float]) -> str:
    return f"{middle:.3f} s ({min(values):.3f} to {max(values):.3f})"


def _config(parallel: ParallelConfig, options: argparse.Namespace) -> Config:
    return Config(
        model=replace(model_of(options.model), vocab_size=257),
        batch=BatchConfig(options.rows, micro_size=options.micro),
        seq_len=options.seq_len,
        parallel=parallel,
        optim=OptimConfig(lr=1e-4),
        precision=options.precision,
    )


def _probed(path: Path, options: argparse.Namespace) -> str:
    settings = [f"model={options.model}", f"batch.size={options.rows}", f"batch.micro_size={options.micro}"]
    settings += [f"seq_len={options.seq_len}", f"precision={options.precision}", f"launch.nproc={RANKS}"]
    command = [sys.executable, "-m", "stoker.launch.cli", "probe", "--quick", "--out", str(path), *settings]
    subprocess.run([*command, "launch.device=cpu"], check=True, stdout=subprocess.DEVNULL)
    return str(path)


def _measured(config: Config, mesh: Mesh, options: argparse.Namespace) -> list[float]:
    keep_freed_memory()
    side, rows = Stoker(config, mesh), batches(config, mesh)
    steps_of(side, rows, 2)
    return [turn_of(side, rows, options.steps, mesh.device).seconds for _ in range(options.turns)]


if __name__ == "__main__":
    main()
