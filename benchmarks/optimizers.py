"""Muon against AdamW: validation loss by step on the demo's data, and the steps after which Muon is where AdamW ends.

    python benchmarks/optimizers.py [--steps 200] [--rates 4e-3,8e-3]

Both train the same small decoder on the same sequences, each at every rate; the best last loss of each is compared.
Half a minute a run on two idle cores. Goal: Muon reaches AdamW's last loss in fewer steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = ["model=tiny", "model.hidden_size=96", "model.intermediate_size=256", "model.num_attention_heads=4"]
DATA = ["seq_len=64", "batch.size=16", "batch.micro_size=16", "eval.sequences=256", "precision=fp32"]
RUN = ["launch.nproc=1", "schedule.warmup_steps=20", "checkpoint.every=0", "log.progress=none"]
Curve = dict[int, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", default="4e-3,8e-3")
    asked = parser.parse_args()
    best: dict[str, Curve] = {}
    for name in ("adamw", "muon"):
        for rate in asked.rates.split(","):
            curve = trained(name, rate, asked.steps)
            last = curve[max(curve)]
            print(f"{name:6} optim.lr={rate}: validation loss {last:.3f}", flush=True)
            if name not in best or last < best[name][max(best[name])]:
                best[name] = curve
    print("step    adamw   muon")
    for step, loss in best["adamw"].items():
        print(f"{step:4}    {loss:.3f}   {best['muon'][step]:.3f}")
    goal = best["adamw"][max(best["adamw"])]
    reached = next((step for step, loss in best["muon"].items() if loss <= goal), None)
    share = (reached or 0) / asked.steps
    print(f"AdamW's last loss, {goal:.3f}, is reached by Muon at step {reached}: {share:.2f} of AdamW's steps")
    sys.exit(0 if reached is not None and reached < asked.steps else 1)


def trained(name: str, rate: str, steps: int) -> Curve:
    """The validation loss of a run by step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [f"run.dir={run}", f"optim={name}", f"optim.lr={rate}", f"steps={steps}", f"eval.every={steps // 10}"]
        command = [sys.executable, "-m", "stoker.launch.cli", "train", *words, *MODEL, *DATA, *RUN]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}


if __name__ == "__main__":
    main()
