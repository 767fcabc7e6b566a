"""Host time of an optimizer step: `engine.update` of this checkout beside that of another one, in turn.

    git worktree add /tmp/before COMMIT
    python benchmarks/updates.py /tmp/before [--rounds 5] [--steps 200] [--layers 24] [--optim adamw]

Each round is a process of each checkout, on one rank, over a model of many small parameters: the time is that of Python
and of launching kernels more than of arithmetic. A process gives the median of its steps; the ratio is the median over
the rounds, with its range. Goal: at most 1.00, within the range.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
PROGRAM = """
import statistics, sys, time
import torch
import torch.distributed as dist
from stoker.conf.schema import BatchConfig, Config, ModelConfig, OptimConfig, ParallelConfig
from stoker.parallel.batch import Batch
from stoker.parallel.layout import batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.trainer.parallelize import cut

name, layers, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
                    num_key_value_heads=1, intermediate_size=32)
config = Config(model=model, batch=BatchConfig(1), seq_len=16, precision="fp32", parallel=ParallelConfig(zero=0),
                optim=OptimConfig(name=name, lr=1e-4))
mesh = mesh_over_default_group(layout_of(config, 1), torch.device("cpu"), 60.0)
engine = cut(config, mesh, batch_plan(config, mesh.layout))
ids = torch.randint(64, (1, 16))
rows = Batch(ids, ids.clone(), torch.arange(16)[None], torch.zeros(1, 16, dtype=torch.int32))
seconds = []
for step in range(steps + 10):
    engine.forward_backward(rows)
    began = time.perf_counter()
    result = engine.update(1e-4)
    seconds.append(time.perf_counter() - began)
    result.read()
print(statistics.median(seconds[10:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--optim", nargs="*", default=["adamw", "sgd"])
    options = parser.parse_args()
    print("| optim | milliseconds of an update | before | ratio (range) |\n| --- | --- | --- | --- |")
    for name in options.optim:
        pairs = []
        for number in range(options.rounds):
            sides = [HERE, options.other] if number % 2 else [options.other, HERE]
            found = {side: _seconds(side, name, options) for side in sides}
            pairs.append((found[HERE], found[options.other]))
        ours, theirs = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
        ratios = [one / other for one, other in pairs]
        ranged = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"| {name} | {ours:.2f} | {theirs:.2f} | {ranged} |", flush=True)


def _seconds(checkout: Path, name: str, options: argparse.Namespace) -> float:
    words = [sys.executable, "-P", "-c", PROGRAM, name, str(options.layers), str(options.steps)]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr}")
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
